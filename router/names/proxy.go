package names

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

const (
	maxQueries = 256              // of all clients of a listener at a time; more are dropped, and clients ask again
	maxPerHost = 32               // of these, of one client: an IPv4 address, or an IPv6 network of 64 bits
	maxBeside  = 16               // of these, of one TCP connection
	maxClients = 64               // TCP connections to a listener
	idle       = 10 * time.Second // for which a TCP connection may be silent (RFC 7766 section 6.2.3)
	applyTime  = time.Second      // for new destinations to be in force
	rebind     = 5 * time.Second  // between two looks at whether the interface is still the same
)

// serve answers queries that come in by an interface to an address. A tunnel's interface may come later, and be made anew.
func (r *Resolver) serve(ctx context.Context, l Listener) {
	told := ""
	for ctx.Err() == nil {
		if err := r.listen(ctx, l); err != nil && ctx.Err() == nil && err.Error() != told {
			told = err.Error()
			r.options.Log.Warn("the DNS proxy does not listen; trying again every second", "address", l.Address, "interface", l.Interface, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// listen serves until ctx is done or the interface is another one. What comes in by another interface does not reach the sockets, even
// when it is sent to the address.
func (r *Resolver) listen(ctx context.Context, l Listener) error {
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
	at := netip.AddrPortFrom(l.Address, 53).String()
	packets, err := config.ListenPacket(ctx, "udp", at)
	if err != nil {
		return err
	}
	defer packets.Close()
	stream, err := config.Listen(ctx, "tcp", at)
	if err != nil {
		return err
	}
	defer stream.Close()
	r.options.Log.Info("the DNS proxy listens", "address", l.Address, "interface", l.Interface)

	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer packets.Close()
	defer stream.Close()
	defer cancel()
	slots := &places{hosts: map[netip.Prefix]int{}}
	wg.Go(func() { defer cancel(); r.packets(ctx, packets, slots, &wg) })
	wg.Go(func() { defer cancel(); r.streams(ctx, stream, slots, &wg) })
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

func (r *Resolver) packets(ctx context.Context, conn net.PacketConn, slots *places, wg *sync.WaitGroup) {
	for {
		buffer := make([]byte, 4096)
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		host := hostOf(from)
		if !slots.take(host) {
			r.drop(host)
			continue
		}
		wg.Go(func() {
			defer slots.leave(host)
			if response := r.respond(ctx, "udp", buffer[:n]); response != nil {
				_, _ = conn.WriteTo(response, from) // a client that has gone asks no more
			}
		})
	}
}

func (r *Resolver) streams(ctx context.Context, l net.Listener, slots *places, wg *sync.WaitGroup) {
	clients := make(chan struct{}, maxClients)
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		select {
		case clients <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-clients }()
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			// Answers go back as they come (RFC 7766 section 6.2.1.1).
			var writing sync.Mutex
			var answers sync.WaitGroup
			defer answers.Wait()
			beside, host := make(chan struct{}, maxBeside), hostOf(conn.RemoteAddr())
			for buffer := make([]byte, 65535); ; {
				_ = conn.SetDeadline(time.Now().Add(idle))
				query, err := readTCP(conn, buffer)
				if err != nil {
					return
				}
				beside <- struct{}{}
				if !slots.take(host) {
					r.drop(host)
					return // the client asks again
				}
				query = append([]byte{}, query...)
				answers.Go(func() {
					defer func() { <-beside }()
					defer slots.leave(host)
					response := r.respond(ctx, "tcp", query)
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
func (r *Resolver) respond(ctx context.Context, network string, query []byte) []byte {
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
		response, err = r.once(ctx, servers, network, query)
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
		if err == nil && len(a.addrs) > 0 && r.learn("", canonical(q.Name), a) {
			if err := r.apply(ctx); err != nil {
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
