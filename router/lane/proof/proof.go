// Package proof sends and receives the STAMP packets (RFC 8762) and echo requests by which package
// lane judges the lanes of links.
package proof

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/echo"
	"github.com/isthmus-net/isthmus/router/lane"
	"github.com/isthmus-net/isthmus/router/lane/stamp"
)

const (
	// maxReplies bounds the replies on a lane between two judgements. The other node sends a few
	// requests.
	maxReplies = 64
	// lookEvery is the time between two looks whether interfaces are still the same, and between
	// two attempts to open a socket.
	lookEvery = time.Second
)

// Options are the dependencies of a Prober.
type Options struct {
	// Changed is called, not too often, after the state of a lane has changed. It must not call the
	// Prober.
	Changed func()
	Log     *slog.Logger
}

// Prober proves the lanes of links while Run runs. Its methods may be called from several
// goroutines.
type Prober struct {
	o     Options
	mu    sync.Mutex
	links []*link
	echo  [2]*echo.Socket // IPv4 and IPv6; nil: not open
}

// link is a link that is proved.
type link struct {
	lane.Link
	judge *lane.Judge
	doors []*door
}

// door is the socket of a lane.
type door struct {
	lane.Lane
	socket  *socket // nil: not open
	looked  time.Time
	replies int // since the last judgement
	// sequence and token are those of the last echo request.
	sequence uint16
	token    [echo.TokenSize]byte
	asked    bool
}

// New returns a Prober without links.
func New(o Options) *Prober { return &Prober{o: o} }

// Use sets the links. Those that stay keep their states, and the sockets of the others are closed.
func (p *Prober) Use(links []lane.Link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	former := p.links
	p.links = nil
	for _, want := range links {
		i := slices.IndexFunc(former, func(l *link) bool { return l.Name == want.Name && l.Node == want.Node })
		var l *link
		if i >= 0 {
			l = former[i]
			former = slices.Delete(slices.Clone(former), i, i+1)
			if reflect.DeepEqual(l.Link, want) {
				p.links = append(p.links, l)
				continue
			}
			l.judge.Use(want, now)
		} else {
			var id [8]byte
			rand.Read(id[:])
			l = &link{judge: lane.NewJudge(want, binary.BigEndian.Uint64(id[:]), now)}
		}
		doors := l.doors
		l.Link, l.doors = want, nil
		for _, one := range want.Lanes {
			j := slices.IndexFunc(doors, func(d *door) bool { return d.Lane == one })
			if j >= 0 {
				l.doors = append(l.doors, doors[j])
				doors = slices.Delete(slices.Clone(doors), j, j+1)
				continue
			}
			l.doors = append(l.doors, &door{Lane: one})
		}
		for _, d := range doors {
			d.close()
		}
		p.links = append(p.links, l)
	}
	for _, l := range former {
		for _, d := range l.doors {
			d.close()
		}
	}
}

// State returns the states of the links, in the order of Use.
func (p *Prober) State() []lane.LinkState {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]lane.LinkState, 0, len(p.links))
	for _, l := range p.links {
		out = append(out, l.judge.State())
	}
	return out
}

// Run proves the lanes until ctx is done. All of its sockets are opened by the calling goroutine.
func (p *Prober) Run(ctx context.Context) error {
	defer p.close()
	tick := time.NewTicker(lane.Interval)
	defer tick.Stop()
	for {
		if p.beat() && p.o.Changed != nil {
			p.o.Changed()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (p *Prober) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.links {
		for _, d := range l.doors {
			d.close()
		}
	}
	for i, s := range p.echo {
		if s != nil {
			s.Close()
			p.echo[i] = nil
		}
	}
}

// beat judges all lanes, and sends the next requests. It returns whether a state has changed.
func (p *Prober) beat() (changed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.links {
		told := l.judge.Tick(time.Now())
		changed = changed || told
		for _, d := range l.doors {
			d.replies = 0
			p.look(l, d)
			if d.socket == nil {
				continue
			}
			l.request(d, false)
			l.request(d, true)
			if l.judge.Asks(d.Number, time.Now()) {
				p.ask(d)
			}
		}
	}
	return changed
}

// look opens the socket of a lane, again if the lane has another interface of the same name.
func (p *Prober) look(l *link, d *door) {
	now := time.Now()
	if now.Sub(d.looked) < lookEvery {
		return
	}
	d.looked = now
	index, err := indexOf(d.Interface)
	if d.socket != nil && (err != nil || index != d.socket.index) {
		d.close()
	}
	if d.socket == nil && err == nil {
		if d.socket, err = open(d.Lane, index); err == nil {
			go p.receive(l, d, d.socket)
		}
	}
	if err != nil {
		l.judge.Failed(d.Number, err)
	}
}

func (d *door) close() {
	if d.socket != nil {
		d.socket.close()
		d.socket = nil
	}
}

// request sends a request on a lane.
func (l *link) request(d *door, probe bool) {
	q, size, ok := l.judge.Request(d.Number, probe, time.Now())
	if !ok {
		return
	}
	err := d.socket.send(stamp.AppendRequest(nil, &q, size-d.socket.headers()), stamp.Port)
	if probe && errors.Is(err, unix.EMSGSIZE) {
		err = nil // the missing answer says it
	}
	l.judge.Failed(d.Number, err)
}

// receive takes the packets of a lane until its socket is closed.
func (p *Prober) receive(l *link, d *door, s *socket) {
	buffer, control := make([]byte, math.MaxUint16), make([]byte, 128)
	for {
		n, port, ttl, err := s.receive(buffer, control)
		if errors.Is(err, errForeign) {
			continue
		}
		if err != nil {
			return // closed
		}
		q, err := stamp.Parse(buffer[:n])
		if err != nil {
			continue
		}
		p.handle(l, d, s, q, n, port, ttl)
	}
}

// handle passes a packet to the judge, and sends the reply.
func (p *Prober) handle(l *link, d *door, s *socket, q stamp.Packet, size int, port uint16, ttl uint8) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case d.socket != s:
		return // closed meanwhile
	case q.Report != nil && (ttl != maxTTL || port != stamp.Port):
		return // a router has forwarded it (RFC 5082), so that the other node did not send it
	case q.Report == nil && port == stamp.Port:
		return // two reflectors would answer each other without an end
	}
	reply := l.judge.Receive(d.Number, q, ttl, time.Now())
	if reply == nil || d.replies == maxReplies {
		return
	}
	d.replies++
	if reply.Report != nil {
		size = 0 // each node probes the size of its own packets only
	}
	l.judge.Failed(d.Number, s.send(stamp.AppendReply(nil, reply, size), port))
}

// ask sends an echo request on a lane.
func (p *Prober) ask(d *door) {
	i := 0
	if d.Remote.Is6() {
		i = 1
	}
	if p.echo[i] == nil {
		s, err := echo.Open(i == 1)
		if err != nil {
			p.o.Log.Debug("lanes are judged without echo requests", "err", err)
			return
		}
		p.echo[i] = s
		go s.Read(p.echoed)
	}
	d.sequence++
	rand.Read(d.token[:])
	d.asked = p.echo[i].Send(d.socket.index, d.Local, d.Remote, d.sequence, d.token[:]) == nil
}

// echoed passes an echo reply to the judge, if it answers the newest request on its lane.
func (p *Prober) echoed(r echo.Reply) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.links {
		for _, d := range l.doors {
			if d.asked && d.socket != nil && d.socket.index == r.Interface && d.Remote == r.From && d.sequence == r.Sequence && string(d.token[:]) == string(r.Data) {
				d.asked = false
				l.judge.Echoed(d.Number, time.Now())
				return
			}
		}
	}
}

// indexOf returns the index of an interface.
func indexOf(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("opening a socket: %w", err)
	}
	defer unix.Close(fd)
	q, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("looking for interface %s: %w", name, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, q); err != nil {
		return 0, fmt.Errorf("looking for interface %s: %w", name, err)
	}
	return int(q.Uint32()), nil
}
