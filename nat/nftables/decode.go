package nftables

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/netlink"
	"golang.org/x/sys/unix"
)

// decodeElement decodes an element that was read back.
func decodeElement(s shape, e nftables.SetElement) (key string, el element, err error) {
	key = string(e.Key)
	if s.isInterval {
		end := e.KeyEnd
		if end == nil {
			end = e.Key
		}
		key += string(end)
	}
	switch {
	case s.isVerdict:
		if el.kind, el.chain, err = decodeVerdict(e.Val); err != nil {
			return "", el, err
		}
	case s.isMap:
		el.data = string(e.Val)
	}
	el.policy, el.before = decodeComment(e.Comment)
	if e.Counter != nil {
		el.now = nat.Counter{Packets: e.Counter.Packets, Bytes: e.Counter.Bytes}
	}
	return key, el, nil
}

// decodeVerdict reads the attributes of a verdict: its code and, for a goto, its chain.
func decodeVerdict(b []byte) (kind int32, chain string, err error) {
	seen := false
	for attr, value := range netlink.Attributes(b) {
		switch attr {
		case unix.NFTA_VERDICT_CODE:
			if len(value) == 4 {
				kind, seen = int32(binary.BigEndian.Uint32(value)), true
			}
		case unix.NFTA_VERDICT_CHAIN:
			chain = netlink.Text(value)
		}
	}
	if !seen {
		return 0, "", fmt.Errorf("an element without a verdict")
	}
	return kind, chain, nil
}

// The comment of an element is the name of its policy and the policy's count before the element
// was made.

func encodeComment(policy string, before nat.Counter) string {
	if before == (nat.Counter{}) {
		return policy
	}
	return fmt.Sprintf("%s %d %d", policy, before.Packets, before.Bytes)
}

func decodeComment(comment string) (policy string, before nat.Counter) {
	words := strings.Fields(comment)
	if len(words) == 3 {
		before.Packets, _ = strconv.ParseUint(words[1], 10, 64)
		before.Bytes, _ = strconv.ParseUint(words[2], 10, 64)
	}
	if len(words) > 0 {
		policy = words[0]
	}
	return policy, before
}

func add(a, b nat.Counter) nat.Counter {
	return nat.Counter{Packets: a.Packets + b.Packets, Bytes: a.Bytes + b.Bytes}
}

// counters returns what each policy has counted.
func (r *ruleset) counters() map[string]nat.Counter {
	sum := map[string]nat.Counter{}
	for _, s := range r.sets {
		for _, e := range s.elements {
			if e.policy != "" {
				sum[e.policy] = add(sum[e.policy], add(e.before, e.now))
			}
		}
	}
	return sum
}

// normal brings expressions that were read back into the form that compile produces.
func normal(exprs []expr.Any) []expr.Any {
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Lookup:
			e.SetID = 0
		case *expr.Dynset:
			e.SetID = 0
		}
	}
	return exprs
}
