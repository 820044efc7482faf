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
	maxQueries = 256              // of all clients of an attachment at a time; more are dropped, and clients ask again
	maxPerHost = 32               // of these, of one client: an IPv4 address, or an IPv6 network of 64 bits
	maxBeside  = 16               // of these, of one TCP connection
	maxClients = 64               // TCP connections of an attachment
	idle       = 10 * time.Second // for which a TCP connection may be silent (RFC 7766 section 6.2.3)
	applyTime  = time.Second      // for new destinations to be in force
	rebind     = 5 * time.Second  // between two looks at whether the interface is still the same
)

// serve answers queries that come in by an interface to an address. A tunnel's interface may come later, and be made again.
func (r *Resolver) serve(ctx context.Context, l egress.Listener) {
	from := r.attach(l.Interface)
	defer r.detach(from)
	defer r.hears(l, nil)
	for ctx.Err() == nil {
		err := r.listen(ctx, l, from)
		if err != nil && ctx.Err() == nil && r.hears(l, err) {
			r.options.Log.Warn("the DNS proxy does not listen; trying again every second", "address", l.Address, "interface", l.Interface, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// deafness is why a listener does not listen.
type deafness struct {
	since time.Time
	err   string
}

// hears notes that a listener listens, or why it does not, and reports whether that is news.
func (r *Resolver) hears(l egress.Listener, err error) (news bool) {
	r.mu.Lock()
	was, deaf := r.deaf[l]
	switch {
	case err == nil:
		delete(r.deaf, l)
		news = deaf
	case !deaf:
		r.deaf[l] = deafness{time.Now(), err.Error()}
		news = true
	case was.err != err.Error():
		r.deaf[l] = deafness{was.since, err.Error()}
		news = true
	}
	r.mu.Unlock()
	if news {
		r.options.Changed(false)
	}
	return news
}

// Deaf returns a listener that does not listen, the first by address and interface, why, and since when; and how many there are.
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

// listen serves until ctx is done or the interface is another one. What comes in by another interface does not reach the sockets, even
// when it is sent to the address.
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
	r.hears(l, nil)
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

// attach returns what there is for the clients behind an interface, until detach.
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

// place takes a place for a client's query, and returns what is to be called with the query; nil: none is free.
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
				_, _ = conn.WriteTo(response, from) // a client that has gone asks no more
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
			// Answers go back as they come (RFC 7766 section 6.2.1.1).
			var writing sync.Mutex
			var answers sync.WaitGroup
			defer answers.Wait()
			beside := make(chan struct{}, maxBeside)
			for buffer := make([]byte, 512); ; {
				_ = conn.SetReadDeadline(time.Now().Add(idle))
				query, err := readTCP(conn, buffer)
				if err != nil {
					return
				}
				beside <- struct{}{}
				respond := r.place(ctx, at, host)
				if respond == nil {
					return // the client asks again
				}
				query = append([]byte{}, query...)
				answers.Go(func() {
					defer func() { <-beside }()
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

// respond returns what a client gets for a query; nil: nothing. What the client is told of a policy's name is a destination by then.
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
		return refuse(h, q, dnsmessage.RCode(response[3]&0xf), false) // so that the client may do what it does then
	}
	if q.Type == dnsmessage.TypeA || q.Type == dnsmessage.TypeAAAA {
		a, err := read(response)
		if err == nil && r.rebinds(canonical(q.Name), a.addrs) {
			r.options.Log.Debug("the DNS proxy refuses an answer with addresses of the inside, of the node or of the platform", "name", q.Name, "addresses", a.addrs)
			return refuse(h, q, dnsmessage.RCodeRefused, false)
		}
		if err == nil && !r.admit(ctx, from, canonical(q.Name), a.addrs) {
			return refuse(h, q, dnsmessage.RCodeServerFailure, false)
		}
		if err == nil && len(a.addrs) > 0 && r.learn(from.name, canonical(q.Name), a) {
			if err := r.apply(ctx); ctx.Err() != nil {
				return refuse(h, q, dnsmessage.RCodeServerFailure, false)
			} else if err != nil {
				r.options.Log.Warn("a client is told addresses that are no destinations yet", "name", q.Name, "err", err)
			}
		}
	}
	if network == "udp" && len(response) > room(query) {
		return refuse(h, q, dnsmessage.RCodeSuccess, true)
	}
	return response
}

// refuse returns a response without an answer; a truncated one has the client ask again over TCP.
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

// room returns how many bytes the client takes by UDP (RFC 6891 section 6.2.3), and at most what gets through everywhere.
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
