package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// generation is a socket that asks the kernel what the library cannot: the number of its ruleset (NFT_MSG_GETGEN), and single
// elements. Every transaction by anyone in the namespace adds one to the number, so an unchanged one means an unchanged ruleset.
type generation struct{ fd int }

// openGeneration opens the socket in a network namespace, or in that of the calling thread when netns is 0.
func openGeneration(netns int) (*generation, error) {
	fd, err := openSocket(netns, 0)
	return &generation{fd}, err
}

// openSocket opens a netfilter socket in a network namespace, or in that of the calling thread when netns is 0.
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
				runtime.UnlockOSThread() // else nothing else may run on this thread
			}
		}()
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return fd, nil
}

// ask sends a request of nf_tables with its attributes, and returns the answer.
func (g *generation) ask(kind uint16, family byte, attributes ...[]byte) ([]byte, error) {
	body := slices.Concat(attributes...)
	request := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+4+len(body)))
	request = binary.NativeEndian.AppendUint16(request, unix.NFNL_SUBSYS_NFTABLES<<8|kind)
	request = binary.NativeEndian.AppendUint16(request, unix.NLM_F_REQUEST)
	request = append(request, make([]byte, 8)...) // sequence number, port id
	request = append(request, family, 0, 0, 0)    // nfgenmsg
	if err := unix.Sendto(g.fd, append(request, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	answer := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(g.fd, answer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return answer[:max(0, n)], err
	}
}

// attribute returns a netlink attribute.
func attribute(kind uint16, value ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofNlAttr+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	return append(b, make([]byte, (4-len(b)%4)%4)...)
}

// attributes calls each for the netlink attributes that bytes hold, as far as they can be read.
func attributes(b []byte, each func(kind uint16, value []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return
		}
		each(binary.NativeEndian.Uint16(b[2:])&^unix.NLA_F_NESTED, b[unix.SizeofNlAttr:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

// body returns what follows the headers of an answer.
func body(b []byte, kind uint16) ([]byte, error) {
	const header = unix.SizeofNlMsghdr + 4
	if len(b) < header || int(binary.NativeEndian.Uint32(b)) > len(b) {
		return nil, errors.New("an answer that is cut off")
	}
	switch binary.NativeEndian.Uint16(b[4:]) {
	case unix.NFNL_SUBSYS_NFTABLES<<8 | kind:
		return b[header:], nil
	case unix.NLMSG_ERROR:
		return nil, unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])))
	}
	return nil, errors.New("an answer of another kind")
}

// read returns the present number.
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
	err = errors.New("no number of a ruleset")
	attributes(b, func(kind uint16, value []byte) {
		if kind == unix.NFTA_GEN_ID && len(value) == 4 {
			number, err = binary.BigEndian.Uint32(value), nil
		}
	})
	return number, err
}

// element reads one element with its counter from a map of verdicts; the library can only read all of them.
func (g *generation) element(at position, s shape) (element, error) {
	nest := func(kind uint16, inner ...[]byte) []byte {
		return attribute(kind|unix.NLA_F_NESTED, slices.Concat(inner...)...)
	}
	half := len(at.key) / 2
	answer, err := g.ask(unix.NFT_MSG_GETSETELEM, unix.NFPROTO_INET,
		attribute(unix.NFTA_SET_ELEM_LIST_TABLE, []byte(tableName+"\x00")...),
		attribute(unix.NFTA_SET_ELEM_LIST_SET, []byte(at.set+"\x00")...),
		nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, nest(unix.NFTA_LIST_ELEM,
			nest(unix.NFTA_SET_ELEM_KEY, attribute(unix.NFTA_DATA_VALUE, []byte(at.key[:half])...)),
			nest(nftables.NFTA_SET_ELEM_KEY_END, attribute(unix.NFTA_DATA_VALUE, []byte(at.key[half:])...)))))
	if err != nil {
		return element{}, fmt.Errorf("reading an element of %s: %w", at.set, err)
	}
	e, key, err := decodeAnswer(answer, s)
	if err == nil && key != at.key {
		err = errors.New("another one came")
	}
	if err != nil {
		return element{}, fmt.Errorf("reading an element of %s: %w", at.set, err)
	}
	return e, nil
}

// decodeAnswer reads the one element of an NFT_MSG_NEWSETELEM.
func decodeAnswer(b []byte, s shape) (e element, key string, err error) {
	if b, err = body(b, unix.NFT_MSG_NEWSETELEM); err != nil {
		return e, "", err
	}
	var raw nftables.SetElement
	value := func(b []byte) (v []byte) {
		attributes(b, func(kind uint16, inner []byte) {
			if kind == unix.NFTA_DATA_VALUE || kind == unix.NFTA_DATA_VERDICT {
				v = inner
			}
		})
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
	attributes(b, func(kind uint16, list []byte) {
		if kind == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			attributes(list, func(_ uint16, e []byte) { attributes(e, one) })
		}
	})
	if raw.Counter == nil {
		return e, "", errors.New("an element without a counter")
	}
	key, e, err = decodeElement(s, raw)
	return e, key, err
}

// decodeCounter reads the expression of a counter.
func decodeCounter(b []byte) *expr.Counter {
	var c *expr.Counter
	attributes(b, func(kind uint16, data []byte) {
		if kind != unix.NFTA_EXPR_DATA {
			return
		}
		c = &expr.Counter{}
		attributes(data, func(kind uint16, v []byte) {
			switch {
			case len(v) != 8:
			case kind == unix.NFTA_COUNTER_BYTES:
				c.Bytes = binary.BigEndian.Uint64(v)
			case kind == unix.NFTA_COUNTER_PACKETS:
				c.Packets = binary.BigEndian.Uint64(v)
			}
		})
	})
	return c
}
