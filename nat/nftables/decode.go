package nftables

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/netlink"
	"golang.org/x/sys/unix"
)

// decodeElement reads an element back.
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

// decodeVerdict reads the attributes of a verdict: its code, and the chain with goto.
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

// The comment of an element is the name of its policy, and what the policy had counted before the element was made.

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

// readable leaves out what the library writes and cannot read back: routing information. The comparison behind it stays,
// and no other rule of ours has one on an empty register.
func readable(rule []expr.Any) (out []expr.Any) {
	for _, e := range rule {
		if _, ok := e.(*expr.Rt); !ok {
			out = append(out, e)
		}
	}
	return out
}

// sameFrame says whether two tables are equal but for the elements of their sets.
func sameFrame(a, b *ruleset) bool {
	if len(a.chains) != len(b.chains) || len(a.sets) != len(b.sets) {
		return false
	}
	for name, c := range a.chains {
		if d := b.chains[name]; d == nil || !sameChain(c, d) {
			return false
		}
	}
	for name, s := range a.sets {
		if b.sets[name] == nil || b.sets[name].shape != s.shape {
			return false
		}
	}
	return true
}

func sameChain(c, d *chain) bool {
	return c.kind == d.kind && c.hook == d.hook && c.priority == d.priority && slices.EqualFunc(c.rules, d.rules, func(a, b []expr.Any) bool {
		return reflect.DeepEqual(readable(a), readable(b))
	})
}

// change is what to do to the elements of a set. What is replaced is in both.
type change struct {
	remove, add map[string]element
}

// changes returns how to get from what the sets hold to what is wanted. The counters of policies that are wanted move from
// elements that go to elements that come or stay; moved is true when there are such, so that the counters in have must be fresh.
func changes(have, want *ruleset) (all map[string]*change, moved bool) {
	all = map[string]*change{}
	changeOf := func(name string) *change {
		if all[name] == nil {
			all[name] = &change{map[string]element{}, map[string]element{}}
		}
		return all[name]
	}
	lost := map[string]nat.Counter{}
	for name, s := range have.sets {
		for key, e := range s.elements {
			if w, ok := want.sets[name].elements[key]; !ok || !e.wants(w) {
				changeOf(name).remove[key] = e
				if e.policy != "" {
					lost[e.policy] = add(lost[e.policy], add(e.before, e.now))
				}
			}
		}
	}
	for name, s := range want.sets {
		for key, w := range s.elements {
			if e, ok := have.sets[name].elements[key]; ok && e.wants(w) {
				continue
			}
			before, goes := lost[w.policy]
			moved = moved || goes
			w.before = before
			delete(lost, w.policy)
			changeOf(name).add[key] = w
		}
	}
	// Counters that are left have no new element to go to: an element of the same policy is replaced by one that carries them.
	for name, s := range want.sets {
		if len(lost) == 0 {
			break
		}
		for key, w := range s.elements {
			counted, goes := lost[w.policy]
			if !goes {
				continue
			}
			moved = true
			e := have.sets[name].elements[key]
			changeOf(name).remove[key] = e
			w.before = add(counted, add(e.before, e.now))
			changeOf(name).add[key] = w
			delete(lost, w.policy)
		}
	}
	return all, moved
}

// keepsSet says whether a set is wanted as it is, but for its elements.
func keepsSet(have, want *ruleset, name string) bool {
	h, w := have.sets[name], want.sets[name]
	return h != nil && w != nil && h.shape == w.shape
}

// besides returns the sets of two rulesets so that both have the same ones, for changes: a set that does not stay is in one of them
// without elements.
func besides(have, want *ruleset, whole bool) (h, w *ruleset) {
	h, w = &ruleset{sets: map[string]*set{}}, &ruleset{sets: map[string]*set{}}
	for name, s := range want.sets {
		h.sets[name], w.sets[name] = &set{shape: s.shape}, s
	}
	for name, s := range have.sets {
		if whole || !keepsSet(have, want, name) {
			name += " before" // which no set is called
			w.sets[name] = &set{shape: s.shape}
		}
		h.sets[name] = s
	}
	return h, w
}

// normal brings expressions that were read back into the form in which they are compiled.
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
