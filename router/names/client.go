package names

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	askTimeout    = 10 * time.Second // for an answer from any server
	serverTimeout = 2 * time.Second  // for one from one server
	maxAliases    = 8                // queries for what an alias leads to
)

// client asks DNS servers.
type client struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// System returns the addresses of the DNS servers that the machine itself uses.
func System() (out []netip.Addr) {
	servers, err := system(resolvConf)
	if err != nil {
		return nil // it asks none
	}
	for _, s := range servers {
		out = append(out, s.Addr())
	}
	return out
}

// resolvConf is the file with the machine's own servers (resolv.conf(5)).
const resolvConf = "/etc/resolv.conf"

// system returns the servers of a file like /etc/resolv.conf (resolv.conf(5)).
func system(file string) ([]netip.AddrPort, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []netip.AddrPort
	for s := bufio.NewScanner(f); s.Scan(); {
		if words := strings.Fields(s.Text()); len(words) > 1 && words[0] == "nameserver" {
			if a, err := netip.ParseAddr(words[1]); err == nil {
				out = append(out, netip.AddrPortFrom(a, 53))
			}
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s names no server", file)
	}
	return out, nil
}

// resolve returns the addresses of one family that a name has, and for how long that is true. That there are none is no error.
func (c *client) resolve(ctx context.Context, servers []netip.AddrPort, name string, ipv6 bool) ([]netip.Addr, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	ttl := time.Duration(1<<63 - 1)
	for range maxAliases {
		query, err := pack(0, name, ipv6)
		if err != nil {
			return nil, 0, err
		}
		response, err := c.ask(ctx, servers, "udp", query)
		if err != nil {
			return nil, 0, err
		}
		a, err := read(response)
		if err != nil {
			return nil, 0, fmt.Errorf("reading the answer: %w", err)
		}
		ttl = min(ttl, a.ttl)
		if a.next == "" {
			return a.addrs, ttl, nil
		}
		name = a.next
	}
	return nil, 0, errors.New("it is an alias of an alias without an end")
}

// ask sends a query to one server after the other until one answers it, and returns the answer: one that says what is true, or
// that there is no such name. A truncated one is asked for again over TCP when the query came by UDP only to fit.
func (c *client) ask(ctx context.Context, servers []netip.AddrPort, network string, query []byte) ([]byte, error) {
	var errs []error
	for _, server := range servers {
		response, err := c.exchange(ctx, network, server, query)
		var h dnsmessage.Header
		if err == nil {
			h, _, err = question(response)
		}
		if err == nil && h.Truncated && network == "udp" {
			if response, err = c.exchange(ctx, "tcp", server, query); err == nil {
				h, _, err = question(response)
			}
		}
		if err == nil && h.RCode != dnsmessage.RCodeSuccess && h.RCode != dnsmessage.RCodeNameError {
			err = fmt.Errorf("it answers %s", strings.TrimPrefix(h.RCode.String(), "RCode"))
		}
		if err == nil {
			return response, nil
		}
		errs = append(errs, fmt.Errorf("asking %v: %w", server, brief(err)))
	}
	return nil, errors.Join(errs...)
}

// brief leaves out what is said already.
func brief(err error) error {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return errors.New("no answer in time")
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}

// exchange sends a query under a random number and returns the response under the number of the query. The port is random
// too, as each query has a socket of its own; what does not answer the question is passed over (RFC 5452).
func (c *client) exchange(ctx context.Context, network string, server netip.AddrPort, query []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, serverTimeout)
	defer cancel()
	conn, err := c.dial(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	asked, wanted, err := question(query)
	if err != nil {
		return nil, err
	}
	sent := append([]byte{}, query...)
	rand.Read(sent[:2])
	if network == "tcp" {
		err = writeTCP(conn, sent)
	} else {
		_, err = conn.Write(sent)
	}
	if err != nil {
		return nil, err
	}
	for buffer := make([]byte, 65535); ; {
		var response []byte
		if network == "tcp" {
			response, err = readTCP(conn, buffer)
		} else {
			var n int
			n, err = conn.Read(buffer)
			response = buffer[:n]
		}
		if err != nil {
			return nil, err
		}
		h, q, err := question(response)
		if err != nil || !h.Response || h.ID != binary.BigEndian.Uint16(sent) || q.Type != wanted.Type || q.Class != wanted.Class || canonical(q.Name) != canonical(wanted.Name) {
			continue
		}
		binary.BigEndian.PutUint16(response, asked.ID)
		return response, nil
	}
}

// writeTCP and readTCP put the length before a message (RFC 1035 section 4.2.2).
func writeTCP(w io.Writer, message []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}

func readTCP(r io.Reader, buffer []byte) ([]byte, error) {
	if _, err := io.ReadFull(r, buffer[:2]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint16(buffer)
	if int(n) > len(buffer) {
		return nil, fmt.Errorf("a message of %d bytes", n)
	}
	_, err := io.ReadFull(r, buffer[:n])
	return buffer[:n], err
}
