package nftables

import (
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
)

// flush commits the transaction that conn has collected.
func (d *Driver) flush(conn *nftables.Conn, what string, elements int) error {
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("changing rules: %w", err)
	}
	d.writes.Add(1)
	d.options.Log.Info("nftables transaction", "kind", what, "elements", elements)
	return nil
}

// edit changes elements, and with an amendment also the chains and timeouts that it adds and
// deletes.
func (d *Driver) edit(conn *nftables.Conn, want *ruleset, todo map[string]*change, a *amendment) error {
	if a == nil {
		a = &amendment{}
	}
	if len(todo)+len(a.made.chains)+len(a.chains) == 0 {
		return nil
	}
	n := 0
	addTimeouts(conn, a.made.timeouts)
	for _, name := range slices.Sorted(maps.Keys(a.made.chains)) {
		k := conn.AddChain(&nftables.Chain{Name: name, Table: table()})
		conn.FlushChain(k) // if the chain exists
		addRules(conn, k, a.made.chains[name])
	}
	if frees(todo) {
		for _, f := range families {
			conn.FlushSet(&nftables.Set{Table: table(), Name: refusedSet(f)})
		}
	}
	// Delete first: new elements may overlap old ones.
	for _, name := range slices.Sorted(maps.Keys(todo)) {
		for part := range slices.Chunk(elements(want.sets[name].shape, todo[name].remove), elementsPerMessage) {
			n += len(part)
			if err := conn.SetDeleteElements(kernelSet(name, want.sets[name]), part); err != nil {
				return fmt.Errorf("changing set %s: %w", name, err)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(todo)) {
		for part := range slices.Chunk(elements(want.sets[name].shape, todo[name].add), elementsPerMessage) {
			n += len(part)
			if err := conn.SetAddElements(kernelSet(name, want.sets[name]), part); err != nil {
				return err
			}
		}
	}
	for _, name := range a.chains {
		conn.DelChain(&nftables.Chain{Name: name, Table: table()})
	}
	deleteTimeouts(conn, a.timeouts)
	return d.flush(conn, "edit", n)
}

func addRules(conn *nftables.Conn, k *nftables.Chain, c *chain) {
	for _, exprs := range c.rules {
		conn.AddRule(&nftables.Rule{Table: k.Table, Chain: k, Exprs: exprs})
	}
}

func addTimeouts(conn *nftables.Conn, objs map[string]*expr.CtTimeout) {
	objects.Lock()
	defer objects.Unlock()
	for _, name := range slices.Sorted(maps.Keys(objs)) {
		conn.AddObj(&nftables.NamedObj{Table: table(), Name: name, Type: nftables.ObjTypeCtTimeout, Obj: objs[name]})
	}
}

func deleteTimeouts(conn *nftables.Conn, names []string) {
	for _, name := range names {
		conn.DeleteObject(&nftables.NamedObj{Table: table(), Name: name, Type: nftables.ObjTypeCtTimeout})
	}
}

// replace makes the table match want in one transaction, so that rules and sets are never absent.
// Chains and sets with the wanted properties stay, and only their rules or elements change: the
// kernel fills a new interval map a moment after the rules that look it up take effect, and until
// then new flows would find nothing in it. The counters of drops stay, and those of policies are
// carried over. With whole, the table is deleted and created again with everything in it.
func (d *Driver) replace(conn *nftables.Conn, have, want *ruleset, whole bool) error {
	if have == nil {
		have = &ruleset{}
	}
	t := table()
	conn.AddTable(t)
	todo, _ := changes(besides(have, want, whole))
	stays := func(name string) bool { return !whole && keepsSet(have, want, name) }
	if whole {
		conn.DelTable(t)
		conn.AddTable(t)
	} else if err := removeUnwanted(conn, have, want, todo); err != nil {
		return err
	}
	addTimeouts(conn, want.timeouts)
	names := []string{begunCounter, portlessCounter}
	for _, reason := range nat.Reasons {
		names = append(names, dropCounter(reason))
	}
	for _, name := range names {
		// unless it exists
		conn.AddObj(&nftables.NamedObj{Table: t, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	}
	chains := map[string]*nftables.Chain{}
	for _, name := range slices.Sorted(maps.Keys(want.chains)) {
		c := want.chains[name]
		k := &nftables.Chain{Name: name, Table: t}
		if c.kind != "" {
			accept := nftables.ChainPolicyAccept
			k.Type, k.Hooknum, k.Priority, k.Policy = c.kind, &c.hook, &c.priority, &accept
		}
		chains[name] = conn.AddChain(k) // unless it exists
	}
	n := 0
	for _, name := range slices.Sorted(maps.Keys(want.sets)) {
		k := kernelSet(name, want.sets[name])
		if !stays(name) {
			if err := conn.AddSet(k, nil); err != nil {
				return err
			}
		}
		if todo[name] == nil {
			continue
		}
		for part := range slices.Chunk(elements(want.sets[name].shape, todo[name].add), elementsPerMessage) {
			n += len(part)
			if err := conn.SetAddElements(k, part); err != nil {
				return err
			}
		}
	}
	for name, c := range want.chains {
		addRules(conn, chains[name], c)
	}
	return d.flush(conn, "replace", n)
}

// removeUnwanted deletes all rules, and the chains, sets, elements and timeouts that are not
// wanted.
func removeUnwanted(conn *nftables.Conn, have, want *ruleset, todo map[string]*change) error {
	t := table()
	if len(have.chains)+len(have.sets) == 0 {
		return nil
	}
	conn.FlushTable(t)
	for _, name := range slices.Sorted(maps.Keys(have.sets)) {
		if !keepsSet(have, want, name) {
			conn.DelSet(&nftables.Set{Table: t, Name: name})
		} else if todo[name] != nil {
			for part := range slices.Chunk(elements(want.sets[name].shape, todo[name].remove), elementsPerMessage) {
				if err := conn.SetDeleteElements(kernelSet(name, want.sets[name]), part); err != nil {
					return fmt.Errorf("changing set %s: %w", name, err)
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.chains)) {
		if c, w := have.chains[name], want.chains[name]; w == nil || w.kind != c.kind || w.hook != c.hook || w.priority != c.priority {
			conn.DelChain(&nftables.Chain{Table: t, Name: name})
		}
	}
	deleteTimeouts(conn, slices.DeleteFunc(slices.Sorted(maps.Keys(have.timeouts)), func(name string) bool { return want.timeouts[name] != nil }))
	return nil
}

// kernelSet returns a set as the library represents it.
func kernelSet(name string, s *set) *nftables.Set {
	d := define(name, s)
	k := &nftables.Set{Table: table(), Name: name, KeyType: d.key, DataType: d.data, IsMap: d.shape.isMap,
		Interval: d.shape.isInterval, Concatenation: d.shape.isConcat, Counter: d.counter}
	k.Size = d.shape.size
	if d.shape.isDynamic {
		k.Dynamic, k.HasTimeout, k.Timeout, k.Size = true, true, d.timeout, dynamicSize
	}
	if d.key == nftables.TypeIFName {
		k.KeyByteOrder = binaryutil.NativeEndian // for tools that list the set
	}
	return k
}

// elements returns elements as the library represents them, sorted by key.
func elements(s shape, es map[string]element) []nftables.SetElement {
	list := make([]nftables.SetElement, 0, len(es))
	for _, key := range slices.Sorted(maps.Keys(es)) {
		e := es[key]
		k := nftables.SetElement{Key: []byte(key), Comment: encodeComment(e.policy, e.before)}
		if s.isInterval {
			half := len(key) / 2
			k.Key, k.KeyEnd = []byte(key[:half]), []byte(key[half:])
		}
		if s.isVerdict {
			k.VerdictData = &expr.Verdict{Kind: expr.VerdictKind(e.kind), Chain: e.chain}
		} else if s.isMap {
			k.Val = []byte(e.data)
		}
		list = append(list, k)
	}
	return list
}
