package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/strongswan/govici/vici"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/ipsec"
)

// vpnDocument has n tunnels that wait for their peers, so that nothing is negotiated. rekey is that
// of the first one.
func vpnDocument(n int, rekey string) string {
	var b strings.Builder
	b.WriteString("node: {name: bench, asn: 64620}\nunderlay: {interface: up0, address: 10.99.0.10, publicAddress: 198.51.100.20}\ntunnels:\n")
	for i := range n {
		after := "45m"
		if i == 0 {
			after = rekey
		}
		fmt.Fprintf(&b, "- {name: cloud-%d, ipsec: {remoteAddress: %v, psk: psk, respondOnly: true, childRekey: %s}}\n", i, address(i).Next(), after)
	}
	return b.String()
}

func (b *bench) ipsec(ctx context.Context) error {
	sizes := []int{b.size(500), b.size(2000)}
	whole := newTable("IPsec: a document with so many tunnels through the daemon's API (interfaces are not made on this kernel)")
	for _, n := range sizes {
		t := newTable("IPsec: %d tunnels loaded into charon by tunnel/ipsec, the same messages given to its vici library, and the same bytes written to the socket", n)
		packets, err := b.recordLoad(ctx, n)
		if err != nil {
			return err
		}
		for range b.rounds {
			if err := b.loadDriver(ctx, t, n); err != nil {
				return err
			}
			if err := b.loadLibrary(ctx, t, n, packets); err != nil {
				return err
			}
			if err := b.loadBare(ctx, t, n, packets); err != nil {
				return err
			}
		}
		t.print(os.Stdout, "vici library", "bare vici")
		for range b.rounds {
			if err := b.loadDaemon(ctx, whole, n); err != nil {
				return err
			}
		}
	}
	whole.print(os.Stdout)
	return nil
}

// vpn is a charon of its own.
type vpn struct {
	lab    *lab.Lab
	node   *lab.Node
	charon *peer.Charon
	empty  float64 // MiB resident before anything was loaded
}

func (b *bench) vpn(ctx context.Context) (*vpn, error) {
	l, err := b.lab()
	if err != nil {
		return nil, err
	}
	v := &vpn{lab: l, node: l.Node("router")}
	v.node.Bridge("up0", netip.MustParsePrefix("10.99.0.10/24"))
	if err = l.Up(ctx); err == nil {
		v.charon, err = peer.StartCharon(ctx, v.node, peer.CharonOptions{Lines: []string{"ikesa_table_size = 4096", "ikesa_table_segments = 16"}})
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	v.empty = status("VmRSS", v.charon.Process.Pid())
	return v, nil
}

// weight is the memory of charon that each of n tunnels takes, in KiB.
func (v *vpn) weight(n int) float64 {
	return (status("VmRSS", v.charon.Process.Pid()) - v.empty) * 1024 / float64(n)
}

var psk = secret.Ref{Name: "psk", Fingerprint: "1"}

func lookUp(secret.Ref) ([]byte, error) { return []byte("correct horse battery staple"), nil }

// decide takes a document through the stages before applying: it parses, checks and plans it.
func decide(document string) ([]tunnel.Config, error) {
	d, problems := spec.Decode([]byte(document))
	s, more := spec.Check(d, func(string) (secret.Ref, bool) { return psk, true })
	if problems = append(problems, more...); len(problems) > 0 {
		return nil, problems
	}
	t, _, problems := plan.Make(s, plan.Ledger{}, plan.Machine{Can: func(string) bool { return true }})
	if len(problems) > 0 {
		return nil, problems
	}
	return t.Tunnels, nil
}

// withDriver applies the tunnels to a driver that runs.
func withDriver(ctx context.Context, socket string, tunnels []tunnel.Config, use func(d *ipsec.Driver, took time.Duration) error) error {
	d := ipsec.New(ipsec.Options{Socket: socket, Secrets: lookUp, Links: newNoLinks()})
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, func(tunnel.State) {}) }()
	defer func() { cancel(); <-done; d.Close() }()
	const parallel = 8 // as router's scheduler does it
	work, failed := make(chan tunnel.Config), make(chan error, parallel)
	start := time.Now()
	for range parallel {
		go func() {
			var errs []error
			for c := range work {
				errs = append(errs, d.Apply(ctx, c))
			}
			failed <- errors.Join(errs...)
		}()
	}
	for _, c := range tunnels {
		work <- c
	}
	close(work)
	var errs []error
	for range parallel {
		errs = append(errs, <-failed)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return use(d, time.Since(start))
}

const edits = 20

func (b *bench) loadDriver(ctx context.Context, t *table, n int) error {
	v, err := b.vpn(ctx)
	if err != nil {
		return err
	}
	defer v.lab.Close()
	tunnels, err := decide(vpnDocument(n, "45m"))
	if err != nil {
		return err
	}
	return withDriver(ctx, v.charon.Socket, tunnels, func(d *ipsec.Driver, took time.Duration) error {
		if writes := int(d.Writes()); writes != 2*n {
			return fmt.Errorf("%d writes for %d tunnels", writes, n)
		}
		t.add("isthmus", "load s", took.Seconds())
		var one []float64
		changed := tunnels[n/2]
		for i := range edits {
			x := *changed.IPsec
			x.ChildRekey += time.Duration(i+1) * time.Minute
			changed.IPsec = &x
			start := time.Now()
			if err := d.Apply(ctx, changed); err != nil {
				return err
			}
			one = append(one, time.Since(start).Seconds()*1000)
		}
		t.add("isthmus", "edit one ms", median(one))
		t.add("isthmus", "charon KiB a tunnel", v.weight(n))
		var list []float64
		for range edits {
			start := time.Now()
			states, err := d.Observe(ctx)
			if err != nil {
				return err
			}
			if len(states) != n {
				return fmt.Errorf("%d of %d tunnels are listed", len(states), n)
			}
			list = append(list, time.Since(start).Seconds()*1000)
		}
		t.add("isthmus", "list all ms", median(list))
		return nil
	})
}

// recordLoad returns the load commands that tunnel/ipsec sends for n tunnels, as they are on the
// socket.
func (b *bench) recordLoad(ctx context.Context, n int) (packets [][]byte, err error) {
	v, err := b.vpn(ctx)
	if err != nil {
		return nil, err
	}
	defer v.lab.Close()
	tunnels, err := decide(vpnDocument(n, "45m"))
	if err != nil {
		return nil, err
	}
	path := filepath.Join(v.lab.Dir, "recorder")
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	var mu sync.Mutex
	go func() {
		for {
			from, err := listener.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("unix", v.charon.Socket)
			if err != nil {
				from.Close()
				return
			}
			go func() { io.Copy(from, to); from.Close() }()
			go func() {
				defer to.Close()
				for {
					p, err := readPacket(from)
					if err != nil {
						return
					}
					if bytes.HasPrefix(p[5:], []byte("\x09load-conn")) || bytes.HasPrefix(p[5:], []byte("\x0bload-shared")) {
						mu.Lock()
						packets = append(packets, p)
						mu.Unlock()
					}
					if _, err := to.Write(p); err != nil {
						return
					}
				}
			}()
		}
	}()
	err = withDriver(ctx, path, tunnels, func(*ipsec.Driver, time.Duration) error { return nil })
	mu.Lock()
	defer mu.Unlock()
	if err == nil && len(packets) != 2*n {
		err = fmt.Errorf("%d load commands for %d tunnels", len(packets), n)
	}
	return packets, err
}

// readPacket reads one vici packet: its length in four bytes, a type, a name where the type has
// one, and a message.
func readPacket(r io.Reader) ([]byte, error) {
	p := make([]byte, 4)
	if _, err := io.ReadFull(r, p); err != nil {
		return nil, err
	}
	p = append(p, make([]byte, binary.BigEndian.Uint32(p))...)
	_, err := io.ReadFull(r, p[4:])
	if err == nil && len(p) < 6 {
		err = errors.New("a vici packet is truncated")
	}
	return p, err
}

// loadBare sends the recorded bytes and nothing else, over a socket.
func (b *bench) loadBare(ctx context.Context, t *table, n int, packets [][]byte) error {
	v, err := b.vpn(ctx)
	if err != nil {
		return err
	}
	defer v.lab.Close()
	conn, err := net.Dial("unix", v.charon.Socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	send := func(p []byte) error {
		if _, err := conn.Write(p); err != nil {
			return err
		}
		answer, err := readPacket(conn)
		if err == nil && !bytes.Contains(answer, []byte("success\x00\x03yes")) {
			err = fmt.Errorf("charon refuses: %q", answer)
		}
		return err
	}
	start := time.Now()
	for _, p := range packets {
		if err := send(p); err != nil {
			return err
		}
	}
	t.add("bare vici", "load s", time.Since(start).Seconds())
	oneConn := packets[slices.IndexFunc(packets, func(p []byte) bool { return bytes.HasPrefix(p[5:], []byte("\x09load-conn")) })]
	var one []float64
	for range edits {
		start := time.Now()
		if err := send(oneConn); err != nil {
			return err
		}
		one = append(one, time.Since(start).Seconds()*1000)
	}
	t.add("bare vici", "edit one ms", median(one))
	t.add("bare vici", "charon KiB a tunnel", v.weight(n))
	return nil
}

// loadLibrary gives the same messages to the vici library that tunnel/ipsec uses, which encodes
// them.
func (b *bench) loadLibrary(ctx context.Context, t *table, n int, packets [][]byte) error {
	v, err := b.vpn(ctx)
	if err != nil {
		return err
	}
	defer v.lab.Close()
	type command struct {
		name    string
		message *vici.Message
	}
	var commands []command
	for _, p := range packets {
		name := 6 + int(p[5])
		m, err := decodeVici(p[name:])
		if err != nil {
			return err
		}
		commands = append(commands, command{string(p[6:name]), m})
	}
	s, err := vici.NewSession(vici.WithSocketPath(v.charon.Socket))
	if err != nil {
		return err
	}
	defer s.Close()
	start := time.Now()
	for _, c := range commands {
		if _, err := s.Call(ctx, c.name, c.message); err != nil {
			return err
		}
	}
	conn := commands[slices.IndexFunc(commands, func(c command) bool { return c.name == "load-conn" })]
	t.add("vici library", "load s", time.Since(start).Seconds())
	var one []float64
	for range edits {
		start := time.Now()
		if _, err := s.Call(ctx, conn.name, conn.message); err != nil {
			return err
		}
		one = append(one, time.Since(start).Seconds()*1000)
	}
	t.add("vici library", "edit one ms", median(one))
	t.add("vici library", "charon KiB a tunnel", v.weight(n))
	return nil
}

// decodeVici reads the elements of a message that charon has accepted.
func decodeVici(b []byte) (*vici.Message, error) {
	sections, keys := []*vici.Message{vici.NewMessage()}, []string{}
	take := func(size int) (s string) { // a text behind its length, which has so many bytes
		n := int(b[0])
		if size == 2 {
			n = int(binary.BigEndian.Uint16(b))
		}
		s, b = string(b[size:size+n]), b[size+n:]
		return s
	}
	var items []string
	for len(b) > 0 {
		kind := b[0]
		b = b[1:]
		var value any
		switch kind {
		case 1: // section
			keys, sections = append(keys, take(1)), append(sections, vici.NewMessage())
			continue
		case 2: // its end
			value, sections = sections[len(sections)-1], sections[:len(sections)-1]
		case 3: // key and value
			keys = append(keys, take(1))
			value = take(2)
		case 4: // list
			keys, items = append(keys, take(1)), nil
			continue
		case 5: // item
			items = append(items, take(2))
			continue
		case 6: // end of the list
			value = items
		default:
			return nil, fmt.Errorf("element of kind %d in a vici message", kind)
		}
		if err := sections[len(sections)-1].Set(keys[len(keys)-1], value); err != nil {
			return nil, err
		}
		keys = keys[:len(keys)-1]
	}
	return sections[0], nil
}

// loadDaemon does it as a user would: a document over gRPC to a daemon that is empty.
func (b *bench) loadDaemon(ctx context.Context, t *table, n int) error {
	v, err := b.vpn(ctx)
	if err != nil {
		return err
	}
	defer v.lab.Close()
	row := fmt.Sprint(n, " tunnels")
	start := time.Now()
	if _, err := decide(vpnDocument(n, "45m")); err != nil {
		return err
	}
	t.add(row, "plan ms", time.Since(start).Seconds()*1000)
	runtime.GC()

	p, c, err := b.startRouter(ctx, v.node, "-vici", v.charon.Socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.secrets.SetSecret(ctx, &isthmusv1.SetSecretRequest{Name: "psk", Value: []byte("correct horse battery staple")}); err != nil {
		return err
	}
	empty := status("VmRSS", p.Pid())
	accepted, done, err := c.apply(ctx, vpnDocument(n, "45m"))
	if err != nil {
		return err
	}
	t.add(row, "apply, accepted ms", accepted.Seconds()*1000)
	t.add(row, "apply, loaded s", done.Seconds())
	var list []float64
	for range 10 {
		start, got := time.Now(), 0
		for page := ""; ; {
			r, err := c.tunnels.ListTunnels(ctx, &isthmusv1.ListTunnelsRequest{PageToken: page, PageSize: 5000})
			if err != nil {
				return err
			}
			got += len(r.Tunnels)
			if page = r.NextPageToken; page == "" {
				break
			}
		}
		if got != n {
			return fmt.Errorf("%d of %d tunnels are listed", got, n)
		}
		list = append(list, time.Since(start).Seconds()*1000)
	}
	t.add(row, "list all ms", median(list))
	// Before the edits, whose former documents are kept as history.
	t.add(row, "daemon KiB a tunnel", (status("VmRSS", p.Pid())-empty)*1024/float64(n))
	t.add(row, "charon KiB a tunnel", v.weight(n))
	var one []float64
	for i := range 5 {
		_, done, err := c.apply(ctx, vpnDocument(n, fmt.Sprint(20+i, "m")))
		if err != nil {
			return err
		}
		one = append(one, done.Seconds()*1000)
	}
	t.add(row, "edit one, loaded ms", median(one))
	return nil
}
