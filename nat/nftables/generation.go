package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/isthmus-net/isthmus/router/netlink"
	"golang.org/x/sys/unix"
)

// generation is a socket for requests that the library does not support: the generation number of
// the ruleset (NFT_MSG_GETGEN), and single elements. Every transaction of any process in the
// namespace increments the number, so an unchanged number means an unchanged ruleset.
type generation struct {
	fd       int
	sequence uint32 // of the last request
}

// patience is how long the kernel may take to answer. Driver.mu is held meanwhile.
const patience = 10 * time.Second

var errTruncated = errors.New("the message is truncated")

// openGeneration opens the socket in a network namespace, or in that of the calling thread when
// netns is 0.
func openGeneration(netns int) (*generation, error) {
	fd, err := openSocket(netns, 0)
	if err != nil {
		return nil, err
	}
	wait := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("preparing a netlink socket: %w", err)
	}
	return &generation{fd: fd}, nil
}

// openSocket opens a netfilter socket in a network namespace, or in that of the calling thread
// when netns is 0.
func openSocket(netns, flags int) (int, error) {
	if netns != 0 {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(home)
			err = unix.Setns(netns, unix.CLONE_NEWNET)
		}
		if err != nil {
			runtime.UnlockOSThread()
			return -1, fmt.Errorf("entering the network namespace: %w", err)
		}
		defer func() {
			if unix.Setns(home, unix.CLONE_NEWNET) == nil {
				// otherwise the thread stays locked, and ends with its goroutine
				runtime.UnlockOSThread()
			}
		}()
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return fd, nil
}

// send sends an nf_tables request with its attributes.
func (g *generation) send(kind, flags uint16, family byte, attributes ...[]byte) error {
	g.sequence++
	header := []byte{family, 0, 0, 0} // nfgenmsg
	// without an address, it goes to the kernel
	_, err := unix.Write(g.fd, netlink.Request(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags, g.sequence, header, slices.Concat(attributes...)))
	return err
}

// receive reads one datagram.
func (g *generation) receive(b []byte) (int, error) {
	for {
		n, _, err := unix.Recvfrom(g.fd, b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			return 0, fmt.Errorf("the kernel has not answered within %v: %w", patience, err)
		}
		return max(0, n), err
	}
}

// ask sends an nf_tables request with its attributes, and returns the answer.
func (g *generation) ask(kind uint16, family byte, attributes ...[]byte) ([]byte, error) {
	if err := g.send(kind, 0, family, attributes...); err != nil {
		return nil, err
	}
	answer := make([]byte, 4096)
	for {
		n, err := g.receive(answer)
		if err != nil {
			return nil, err
		}
		// An answer that came after its request was given up has another sequence number.
		if m, _, ok := netlink.Next(answer[:n]); !ok || m.Sequence == g.sequence {
			return answer[:n], nil
		}
	}
}

// body returns the attributes of an answer, without its headers.
func body(b []byte, kind uint16) ([]byte, error) {
	m, _, ok := netlink.Next(b)
	if !ok || len(m.Body) < 4 {
		return nil, errTruncated
	}
	switch m.Kind {
	case unix.NFNL_SUBSYS_NFTABLES<<8 | kind:
		return m.Body[4:], nil
	case unix.NLMSG_ERROR:
		return nil, m.Errno()
	}
	return nil, errors.New("the answer has another type")
}

// read returns the current generation number.
func (g *generation) read() (uint32, error) {
	answer, err := g.ask(unix.NFT_MSG_GETGEN, unix.AF_UNSPEC)
	if err != nil {
		return 0, err
	}
	return decodeGeneration(answer)
}

// decodeGeneration reads an NFT_MSG_NEWGEN.
func decodeGeneration(b []byte) (number uint32, err error) {
	if b, err = body(b, unix.NFT_MSG_NEWGEN); err != nil {
		return 0, err
	}
	err = errors.New("the answer has no generation number")
	for kind, value := range netlink.Attributes(b) {
		if kind == unix.NFTA_GEN_ID && len(value) == 4 {
			number, err = binary.BigEndian.Uint32(value), nil
		}
	}
	return number, err
}

// element reads one element of a verdict map, with its counter; the library can only read all
// elements.
func (g *generation) element(at position, s shape) (element, error) {
	half := len(at.key) / 2
	answer, err := g.ask(unix.NFT_MSG_GETSETELEM, unix.NFPROTO_INET,
		netlink.NewText(unix.NFTA_SET_ELEM_LIST_TABLE, tableName),
		netlink.NewText(unix.NFTA_SET_ELEM_LIST_SET, at.set),
		netlink.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, netlink.Nest(unix.NFTA_LIST_ELEM,
			netlink.Nest(unix.NFTA_SET_ELEM_KEY, netlink.New(unix.NFTA_DATA_VALUE, []byte(at.key[:half])...)),
			netlink.Nest(nftables.NFTA_SET_ELEM_KEY_END, netlink.New(unix.NFTA_DATA_VALUE, []byte(at.key[half:])...)))))
	if err != nil {
		return element{}, fmt.Errorf("reading an element of %s: %w", at.set, err)
	}
	e, key, err := decodeAnswer(answer, s)
	if err == nil && key != at.key {
		err = errors.New("the answer has another key")
	}
	if err != nil {
		return element{}, fmt.Errorf("reading an element of %s: %w", at.set, err)
	}
	return e, nil
}

// decodeAnswer decodes the one element of an NFT_MSG_NEWSETELEM.
func decodeAnswer(b []byte, s shape) (e element, key string, err error) {
	if b, err = body(b, unix.NFT_MSG_NEWSETELEM); err != nil {
		return e, "", err
	}
	var raw nftables.SetElement
	value := func(b []byte) (v []byte) {
		for kind, inner := range netlink.Attributes(b) {
			if kind == unix.NFTA_DATA_VALUE || kind == unix.NFTA_DATA_VERDICT {
				v = inner
			}
		}
		return v
	}
	one := func(kind uint16, b []byte) {
		switch kind {
		case unix.NFTA_SET_ELEM_KEY:
			raw.Key = value(b)
		case nftables.NFTA_SET_ELEM_KEY_END:
			raw.KeyEnd = value(b)
		case unix.NFTA_SET_ELEM_DATA:
			raw.Val = value(b)
		case unix.NFTA_SET_ELEM_USERDATA:
			raw.Comment, _ = userdata.GetString(b, userdata.NFTNL_UDATA_SET_ELEM_COMMENT)
		case unix.NFTA_SET_ELEM_EXPR:
			raw.Counter = decodeCounter(b)
		}
	}
	for kind, list := range netlink.Attributes(b) {
		if kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		for _, e := range netlink.Attributes(list) {
			for kind, value := range netlink.Attributes(e) {
				one(kind, value)
			}
		}
	}
	if raw.Counter == nil {
		return e, "", errors.New("an element without a counter")
	}
	key, e, err = decodeElement(s, raw)
	return e, key, err
}

// decodeCounter reads the expression of a counter.
func decodeCounter(b []byte) *expr.Counter {
	var c *expr.Counter
	for kind, data := range netlink.Attributes(b) {
		if kind != unix.NFTA_EXPR_DATA {
			continue
		}
		c = &expr.Counter{}
		for kind, v := range netlink.Attributes(data) {
			switch {
			case len(v) != 8:
			case kind == unix.NFTA_COUNTER_BYTES:
				c.Bytes = binary.BigEndian.Uint64(v)
			case kind == unix.NFTA_COUNTER_PACKETS:
				c.Packets = binary.BigEndian.Uint64(v)
			}
		}
	}
	return c
}
