package dns

import (
	"bufio"
	"bytes"
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
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// askTimeout bounds the wait for an answer from any server. Clients wait as long
	// (resolv.conf(5): 5 seconds, twice).
	askTimeout = 10 * time.Second
	// serverTimeout is how long a query waits for one server before it also asks the next. A later
	// answer of the first still counts.
	serverTimeout = 2 * time.Second
	maxAliases    = 8    // queries along a chain of aliases
	maxPacket     = 4096 // bytes of a UDP answer; a longer one is queried again over TCP
	truncated     = 2    // the TC bit, in the third byte of the header
)

// client queries DNS servers.
type client struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu   sync.Mutex
	edns map[netip.AddrPort]bool // servers that have answered, and whether they support EDNS
	// when the first server without EDNS was noted; all are tried again after plainTime
	plain time.Time
}

const (
	// maxServers bounds the servers in client.edns.
	maxServers = 256
	// plainTime is how long a server counts as one without EDNS.
	plainTime = 10 * time.Minute
)

// knows returns whether a server supports EDNS, and whether that is known.
func (c *client) knows(server netip.AddrPort) (edns, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.plain.IsZero() && time.Since(c.plain) > plainTime {
		c.edns, c.plain = nil, time.Time{}
	}
	edns, known = c.edns[server]
	return edns, known
}

func (c *client) note(server netip.AddrPort, edns bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.edns == nil || len(c.edns) >= maxServers {
		c.edns = map[netip.AddrPort]bool{}
	}
	c.edns[server] = edns
	if !edns && c.plain.IsZero() {
		c.plain = time.Now()
	}
}

// System returns the DNS servers that the machine itself uses.
func System() (out []netip.Addr) {
	servers, err := system(resolvConf)
	if err != nil {
		return nil // without the file, there are none
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
		return nil, fmt.Errorf("%s has no nameserver line with an address", file)
	}
	return out, nil
}

// resolve returns the addresses of a name in one family, and how long they are valid. A name
// without addresses is not an error.
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
	return nil, 0, errors.New("the chain of aliases is too long")
}

// ask queries the servers in order and returns the first answer with NOERROR or NXDOMAIN. It goes
// on to the next server when the latest one fails or is silent for serverTimeout, and accepts late
// answers of the earlier ones until ctx is done. Without such an answer, ask returns an error, and
// the last answer with another code if there was one.
func (c *client) ask(ctx context.Context, servers []netip.AddrPort, network string, query []byte) (last []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	type reply struct {
		server   int
		response []byte
		err      error
	}
	replies := make(chan reply, len(servers))
	errs := make([]error, len(servers))
	failed := func(server int, err error) {
		errs[server] = fmt.Errorf("asking %v: %w", servers[server], brief(err))
	}
	begun, ended := 0, 0
	for ended < len(servers) {
		var later <-chan time.Time
		if begun < len(servers) {
			server := begun
			begun++
			failed(server, errSilent) // until it answers
			go func() {
				response, err := c.fallBack(ctx, network, servers[server], query)
				replies <- reply{server, response, err}
			}()
			later = time.After(serverTimeout)
		}
		for wait := true; wait && ended < len(servers); {
			select {
			case r := <-replies:
				ended++
				if r.err == nil {
					code := r.response[3] & 0xf
					if code == byte(dnsmessage.RCodeSuccess) || code == byte(dnsmessage.RCodeNameError) {
						return r.response, nil
					}
					last, r.err = r.response, fmt.Errorf("it answers %s", strings.TrimPrefix(dnsmessage.RCode(code).String(), "RCode"))
				}
				failed(r.server, r.err)
				// ask the next server when the latest one fails
				wait = begun == len(servers) || r.server < begun-1
			case <-later:
				wait = false
			case <-ctx.Done():
				return last, errors.Join(errs...)
			}
		}
	}
	return last, errors.Join(errs...)
}

// fallBack queries one server. It repeats the query without EDNS when the server answers FORMERR or
// NOTIMP without an OPT record, or is silent for serverTimeout (RFC 6891 section 6.2.2, RFC 8906).
// The result is kept for plainTime.
func (c *client) fallBack(ctx context.Context, network string, server netip.AddrPort, query []byte) ([]byte, error) {
	bare, err := withoutOPT(query)
	if err != nil {
		return nil, err
	}
	edns, known := c.knows(server)
	if bare == nil || known && !edns {
		if bare != nil {
			query = bare
		}
		return c.whole(ctx, network, server, query)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type reply struct {
		response []byte
		err      error
	}
	begin := func(query []byte) <-chan reply {
		out := make(chan reply, 1)
		go func() {
			response, err := c.whole(ctx, network, server, query)
			out <- reply{response, err}
		}()
		return out
	}
	full := begin(query)
	var silence <-chan time.Time
	if !known { // a server that supports EDNS is silent for another reason
		silence = time.After(serverTimeout)
	}
	var first reply
	var second <-chan reply
	for {
		select {
		case first = <-full:
			full = nil
			if first.err == nil {
				code := dnsmessage.RCode(first.response[3] & 0xf)
				if hasOPT(first.response) || code != dnsmessage.RCodeFormatError && code != dnsmessage.RCodeNotImplemented {
					c.note(server, true)
					return first.response, nil
				}
			} else if second == nil {
				return nil, first.err
			}
			if silence = nil; second == nil {
				second = begin(bare)
			}
		case <-silence:
			second = begin(bare)
		case r := <-second:
			if r.err == nil {
				if code := dnsmessage.RCode(r.response[3] & 0xf); code == dnsmessage.RCodeSuccess || code == dnsmessage.RCodeNameError {
					c.note(server, false)
				}
				return r.response, nil
			}
			if full != nil {
				first = <-full
			}
			return first.response, first.err
		}
	}
}

// whole queries one server. When a UDP answer is truncated, it repeats the query over TCP.
func (c *client) whole(ctx context.Context, network string, server netip.AddrPort, query []byte) ([]byte, error) {
	response, err := c.exchange(ctx, network, server, query)
	if err == errOtherCase {
		// The answer may be forged, or the server changes the case of names. Over TCP, a forger
		// would have to see the packets.
		short, cancel := context.WithTimeout(ctx, serverTimeout)
		defer cancel()
		if sure, err := c.exchange(short, "tcp", server, query); err == nil {
			return sure, nil
		}
		err = nil
	}
	if err == nil && network == "udp" && response[2]&truncated != 0 {
		response, err = c.exchange(ctx, "tcp", server, query)
	}
	return response, err
}

// errOtherCase comes with a response whose question differs from the query in the case of letters.
var errOtherCase = errors.New("the answer has the name in another case")

// errSilent stands for every way in which the wait for an answer can time out.
var errSilent = errors.New("no answer in time")

// brief leaves out the operation and the address, which the caller adds.
func brief(err error) error {
	var timeout net.Error
	// exchange closes the connection when its context ends.
	if errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, net.ErrClosed) || errors.Is(err, context.DeadlineExceeded) {
		return errSilent
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}

// exchange sends a query with a random ID and returns the response with the ID of the query. The
// port is random too, because each query has its own socket. Responses that do not match the
// question are ignored (RFC 5452).
func (c *client) exchange(ctx context.Context, network string, server netip.AddrPort, query []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
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
	name := nameIn(sent)
	mixCase(name)
	if network == "tcp" {
		err = writeTCP(conn, sent)
	} else {
		_, err = conn.Write(sent)
	}
	if err != nil {
		return nil, err
	}
	for buffer := make([]byte, maxPacket+1); ; {
		var response []byte
		if network == "tcp" {
			response, err = readTCP(conn, buffer)
		} else {
			var n int
			if n, err = conn.Read(buffer); n > maxPacket {
				n = maxPacket
				buffer[2] |= truncated
			}
			response = buffer[:n]
		}
		if err != nil {
			return nil, err
		}
		if code := fault(response, sent); code != dnsmessage.RCodeSuccess {
			// A server that cannot parse a query returns the header alone (RFC 1035 section 4.1.1).
			h, q, err := question(query)
			if err != nil {
				return nil, err
			}
			return refuse(h, q, code, false), nil
		}
		h, q, err := question(response)
		if err != nil || !h.Response || h.ID != binary.BigEndian.Uint16(sent) || q.Type != wanted.Type || q.Class != wanted.Class || canonical(q.Name) != canonical(wanted.Name) {
			continue
		}
		binary.BigEndian.PutUint16(response, asked.ID)
		echoed := nameIn(response)
		same := bytes.Equal(echoed, name)
		if len(echoed) == len(name) {
			copy(echoed, nameIn(query)) // in the case that the client used
		}
		if !same && network == "udp" {
			return response, errOtherCase
		}
		return response, nil
	}
}

// writeTCP and readTCP put the length before a message (RFC 1035 section 4.2.2). The result of
// readTCP may share the buffer, which must have at least two bytes.
func writeTCP(w io.Writer, message []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}

func readTCP(r io.Reader, buffer []byte) ([]byte, error) {
	if _, err := io.ReadFull(r, buffer[:2]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(buffer))
	if n > len(buffer) {
		buffer = make([]byte, n)
	}
	_, err := io.ReadFull(r, buffer[:n])
	return buffer[:n], err
}
