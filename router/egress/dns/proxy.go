package dns

import (
	"cmp"
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/egress"
)

const (
	// pending queries of an attachment; more are dropped, and clients retry
	maxQueries   = 256
	maxPerHost   = 32               // pending queries of a client: an IPv4 address or an IPv6 /64
	maxPipelined = 16               // pending queries of one TCP connection
	maxClients   = 64               // TCP connections of an attachment
	idle         = 10 * time.Second // idle limit of a TCP connection (RFC 7766 section 6.2.3)
	applyTime    = time.Second      // for new destinations to take effect
	rebind       = 5 * time.Second  // interval of checks for a replaced interface
)

// serve answers queries that arrive on an interface for an address. A tunnel's interface may appear
// later, and may be recreated.
func (r *Resolver) serve(ctx context.Context, l egress.Listener) {
	from := r.attach(l.Interface)
	defer r.detach(from)
	defer r.noteListening(l, nil)
	for ctx.Err() == nil {
		err := r.listen(ctx, l, from)
		if err != nil && ctx.Err() == nil && r.noteListening(l, err) {
			r.options.Log.Warn("the DNS proxy does not listen; retrying every second", "address", l.Address, "interface", l.Interface, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// listenFailure is why a listener does not listen.
type listenFailure struct {
	since time.Time
	err   string
}

// noteListening records whether a listener listens, and reports whether that has changed.
func (r *Resolver) noteListening(l egress.Listener, err error) (news bool) {
	r.mu.Lock()
	was, deaf := r.deaf[l]
	switch {
	case err == nil:
		delete(r.deaf, l)
		news = deaf
	case !deaf:
		r.deaf[l] = listenFailure{time.Now(), err.Error()}
		news = true
	case was.err != err.Error():
		r.deaf[l] = listenFailure{was.since, err.Error()}
		news = true
	}
	r.mu.Unlock()
	if news {
		r.options.Changed(false)
	}
	return news
}

// Deaf returns the first listener, by address and interface, that does not listen, with the error
// and its time, and the number of such listeners.
func (r *Resolver) Deaf() (first egress.Listener, err string, since time.Time, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for l, d := range r.deaf {
		if n++; n == 1 || cmp.Or(l.Address.Compare(first.Address), strings.Compare(l.Interface, first.Interface)) < 0 {
			first, err, since = l, d.err, d.since
		}
	}
	return first, err, since, n
}

// listen serves until ctx is done or the interface is replaced. The sockets receive nothing from
// other interfaces, even packets to the same address.
func (r *Resolver) listen(ctx context.Context, l egress.Listener, at *attachment) error {
	bound, err := net.InterfaceByName(l.Interface)
	if err != nil {
		return err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if outer := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), l.Interface) }); outer != nil {
			return outer
		}
		return err
	}}
	address := netip.AddrPortFrom(l.Address, 53).String()
	packets, err := config.ListenPacket(ctx, "udp", address)
	if err != nil {
		return err
	}
	defer packets.Close()
	stream, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer stream.Close()
	r.noteListening(l, nil)
	r.options.Log.Info("the DNS proxy listens", "address", l.Address, "interface", l.Interface)

	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer packets.Close()
	defer stream.Close()
	defer cancel()
	wg.Go(func() { defer cancel(); r.packets(ctx, packets, at, &wg) })
	wg.Go(func() { defer cancel(); r.streams(ctx, stream, at, &wg) })
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(rebind):
		}
		if now, err := net.InterfaceByName(l.Interface); err != nil || now.Index != bound.Index {
			return err
		}
	}
}

// attach returns the state for the clients behind an interface, which lives until detach.
func (r *Resolver) attach(iface string) *attachment {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.attachments[iface]
	if a == nil {
		a = newAttachment(iface)
		r.attachments[iface] = a
	}
	a.listeners++
	return a
}

func (r *Resolver) detach(a *attachment) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.listeners--; a.listeners == 0 {
		delete(r.attachments, a.name)
		for _, f := range a.kept {
			r.forgetLocked(f)
		}
		a.kept = nil
	}
}

// place takes a place for a client's query and returns the function that answers the query; nil: no
// place is free.
func (r *Resolver) place(ctx context.Context, from *attachment, host netip.Prefix) (respond func(network string, query []byte) []byte) {
	ctx, cancel := context.WithCancel(ctx)
	had, left := from.queries.take(host, cancel)
	switch {
	case had == nil:
		cancel()
		r.drop(host)
		return nil
	case left.IsValid():
		r.drop(left)
	}
	return func(network string, query []byte) []byte {
		defer cancel()
		defer from.queries.leave(had)
		return r.respond(ctx, from, network, query)
	}
}

func (r *Resolver) packets(ctx context.Context, conn net.PacketConn, at *attachment, wg *sync.WaitGroup) {
	for buffer := make([]byte, 4096); ; {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		respond := r.place(ctx, at, hostOf(from))
		if respond == nil {
			continue
		}
		query := append([]byte{}, buffer[:n]...)
		wg.Go(func() {
			if response := respond("udp", query); response != nil {
				_, _ = conn.WriteTo(response, from) // a client that has left does not need it
			}
		})
	}
}

func (r *Resolver) streams(ctx context.Context, l net.Listener, at *attachment, wg *sync.WaitGroup) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		host := hostOf(conn.RemoteAddr())
		had, _ := at.streams.take(host, func() { conn.Close() })
		if had == nil {
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer at.streams.leave(had)
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			// Answers may be out of order (RFC 7766 section 6.2.1.1).
			var writing sync.Mutex
			var answers sync.WaitGroup
			defer answers.Wait()
			pipelined := make(chan struct{}, maxPipelined)
			for buffer := make([]byte, 512); ; {
				_ = conn.SetReadDeadline(time.Now().Add(idle))
				query, err := readTCP(conn, buffer)
				if err != nil {
					return
				}
				pipelined <- struct{}{}
				respond := r.place(ctx, at, host)
				if respond == nil {
					return // the client retries
				}
				query = append([]byte{}, query...)
				answers.Go(func() {
					defer func() { <-pipelined }()
					response := respond("tcp", query)
					writing.Lock()
					defer writing.Unlock()
					_ = conn.SetDeadline(time.Now().Add(idle))
					if response == nil || writeTCP(conn, response) != nil {
						conn.Close()
					}
				})
			}
		})
	}
}

// respond returns the response to a client's query; nil: none. Addresses of a policy's name are
// destinations before respond returns them.
func (r *Resolver) respond(ctx context.Context, from *attachment, network string, query []byte) []byte {
	h, q, err := question(query)
	if err != nil || h.Response {
		return nil
	}
	if h.OpCode != 0 {
		return refuse(h, q, dnsmessage.RCodeNotImplemented, false)
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	servers, err := r.servers()
	var response []byte
	if err == nil {
		response, err = r.once(ctx, from, servers, network, query)
	}
	if err != nil {
		r.options.Log.Debug("the DNS proxy has no answer", "name", q.Name, "err", err)
		if response == nil {
			return refuse(h, q, dnsmessage.RCodeServerFailure, false)
		}
		// so that the client can react to the code
		return refuse(h, q, dnsmessage.RCode(response[3]&0xf), false)
	}
	if q.Type == dnsmessage.TypeA || q.Type == dnsmessage.TypeAAAA {
		a, err := read(response)
		if err == nil && r.rebinds(canonical(q.Name), a.addrs) {
			r.options.Log.Debug("the DNS proxy refuses an answer with an address of the inside, the node or the platform", "name", q.Name, "addresses", a.addrs)
			return refuse(h, q, dnsmessage.RCodeRefused, false)
		}
		if err == nil && !r.admit(ctx, from, canonical(q.Name), a.addrs) {
			return refuse(h, q, dnsmessage.RCodeServerFailure, false)
		}
		if err == nil && len(a.addrs) > 0 && r.learn(from.name, canonical(q.Name), a) {
			if err := r.apply(ctx); ctx.Err() != nil {
				return refuse(h, q, dnsmessage.RCodeServerFailure, false)
			} else if err != nil {
				r.options.Log.Warn("a client receives addresses that are not destinations yet", "name", q.Name, "err", err)
			}
		}
	}
	if network == "udp" && len(response) > room(query) {
		return refuse(h, q, dnsmessage.RCodeSuccess, true)
	}
	return response
}

// refuse returns a response without an answer. A truncated one makes the client retry over TCP.
func refuse(h dnsmessage.Header, q dnsmessage.Question, code dnsmessage.RCode, truncated bool) []byte {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{
		ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: true, RCode: code, Truncated: truncated,
	})
	if b.StartQuestions() != nil || b.Question(q) != nil {
		return nil
	}
	out, err := b.Finish()
	if err != nil {
		return nil
	}
	return out
}

// room returns the UDP size that the client accepts (RFC 6891 section 6.2.3), at most maxUDP.
func room(query []byte) int {
	var p dnsmessage.Parser
	if _, err := p.Start(query); err != nil || p.SkipAllQuestions() != nil || p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		return 512
	}
	for {
		h, err := p.AdditionalHeader()
		if err != nil {
			return 512
		}
		if h.Type == dnsmessage.TypeOPT {
			return max(512, min(int(h.Class), maxUDP))
		}
		if p.SkipAdditional() != nil {
			return 512
		}
	}
}
