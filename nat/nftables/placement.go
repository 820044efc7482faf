package nftables

import (
	"cmp"
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// begunCounter is the name of the counter of flows that began with a pool's address.
const begunCounter = "begun"

// portlessCounter is the name of the counter of packets that tried to begin a flow without ports.
const portlessCounter = "begun-portless"

// fullSet is the name of the set of the families for which no new flow may leave.
const fullSet = "table-full"

const (
	// dynamicSize is the maximum number of elements of a set that rules fill.
	dynamicSize = 65536
	// meterIdle is how long the kernel keeps a meter's element without a new flow.
	meterIdle = time.Minute
	// refusedIdle is how long a refused client gets an immediate refusal.
	refusedIdle = 30 * time.Second
)

func zoneMap(f family) string                { return "zones-" + f.suffix }
func placedMap(pool string, f family) string { return "placed-" + pool + "-" + f.suffix }
func exhaustedSet(pool string, f family) string {
	return "full-" + pool + "-" + f.suffix
}
func refuseChain(f family) string           { return "refuse-" + f.suffix }
func refusedSet(f family) string            { return "refused-" + f.suffix }
func meterSet(pool string, f family) string { return "begun-" + pool + "-" + f.suffix }

// placement completes the definition of a set that holds placements or refusals, and reports
// whether the set is one.
func (d *definition) placement(addr nftables.SetDatatype) bool {
	service := []nftables.SetDatatype{addr, nftables.TypeInetProto, nftables.TypeInetService}
	kind, _, _ := strings.Cut(d.name, "-")
	switch {
	case d.name == fullSet:
		d.key, d.counter = nftables.TypeNFProto, true
	case kind == "pool", kind == "late":
		d.key, d.data = nftables.MustConcatSetType(nftables.TypeMark, nftables.TypeMark), addr
	case kind == "blocks":
		// Twice the pair: the first and the last port. In this form nft can list the rule.
		d.key, d.data = addr, nftables.MustConcatSetType(addr, nftables.TypeInetService)
		d.data.Bytes *= 2
	case kind == "zones":
		d.key, d.data = nftables.MustConcatSetType(addr, nftables.TypeInetProto), nftables.TypeMark
	case kind == "placed":
		d.key, d.data = nftables.MustConcatSetType(addr, addr), addr
	case kind == "full":
		d.key, d.counter = nftables.MustConcatSetType(service...), true
	case kind == "refused", kind == "begun":
		d.key, d.timeout = nftables.MustConcatSetType(append([]nftables.SetDatatype{addr}, service...)...), meterIdle
		if kind == "refused" {
			d.timeout = refusedIdle
		}
	default:
		return false
	}
	return true
}

// addPools adds a chain for each pool that translates the source of new flows. The address depends
// only on elements of maps: the placement of the source, otherwise the address of its slot.
func (r *ruleset) addPools(c nat.Config) {
	for _, f := range families {
		if len(c.Zones) > 0 {
			r.sets[zoneMap(f)] = &set{shape: shape{isMap: true, isInterval: true, isConcat: true}, elements: zoneElements(c, f)}
		}
		for _, p := range c.Pools {
			addrs := p.Family(f.ipv6)
			if len(addrs) == 0 {
				continue
			}
			name, placed := poolName(p.Name, f.ipv6), placedMap(p.Name, f)
			if p.Blocks != nil {
				r.chains[name] = r.blockChain(p, f)
				continue
			}
			near := r.addSlots(name, c, addrs, p.Slots)
			translate := exprs(&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto), RegAddrMin: reg1, RegAddrMax: reg1})
			look := func(name string) expr.Any {
				return &expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: name}
			}
			// The zone is in the first register, the slot follows it.
			bySlot := func(slots string, translate []expr.Any) []expr.Any {
				return rule(exprs(network(f.source, f.size, register(16)),
					&expr.Hash{SourceRegister: register(16), DestRegister: register(4), Length: f.size, Modulus: nat.Slots, Seed: nat.HashSeed, Type: expr.HashTypeJenkins},
					look(slots)), translate)
			}

			exhausted := exprs(verdict(expr.VerdictGoto, refuseChain(f)))
			if p.Silent {
				exhausted = exprs(verdict(expr.VerdictDrop, ""))
			}
			r.sets[meterSet(p.Name, f)] = &set{shape: shape{isConcat: true, isDynamic: true}}
			pool := &chain{rules: [][]expr.Any{
				rule(isPortless(), exprs(verdict(expr.VerdictGoto, portlessChain(p.Name, f)))),
				rule(service(f, 0), exprs(setLookup(exhaustedSet(p.Name, f))), exhausted),
				meter(p.Name, f, unix.IPPROTO_TCP),
				meter(p.Name, f, unix.IPPROTO_UDP),
			}}
			home := func(slots string, translate []expr.Any) (rules [][]expr.Any) {
				if near {
					rules = append(rules, rule(exprs(network(f.source, f.size, register(0)), meta(expr.MetaKeyL4PROTO, register(f.size)), look(zoneMap(f))), bySlot(slots, translate)))
				}
				// Every slot has an address. If one had none, the flow must not pass.
				return append(rules, rule(exprs(&expr.Immediate{Register: reg1, Data: make([]byte, 4)}), bySlot(slots, translate)), exprs(verdict(expr.VerdictGoto, dropped)))
			}
			choice := func(translate []expr.Any) [][]expr.Any {
				place := rule(exprs(network(f.source, f.size, register(0)), network(f.dst, f.size, register(f.size)), look(placed)), translate)
				return append([][]expr.Any{place}, home(name, translate)...)
			}
			low := lowChain(p.Name, f)
			if p.Shared {
				began := lateName(p.Name, f)
				r.addSlots(began, c, addrs, p.HomeSlots)
				r.chains[began] = &chain{rules: append([][]expr.Any{rule(hasLowPort(unix.IPPROTO_TCP), exprs(verdict(expr.VerdictGoto, began+"-low")))}, home(began, translate)...)}
				r.chains[began+"-low"] = &chain{rules: home(began, translateHigh(f))}
				pool.rules = append(pool.rules, rule(late(), exprs(verdict(expr.VerdictGoto, began))))
			}
			r.chains[low] = &chain{rules: choice(translateHigh(f))}
			for _, protocol := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP} {
				pool.rules = append(pool.rules, rule(hasLowPort(protocol), exprs(verdict(expr.VerdictGoto, low))))
			}
			pool.rules = append(pool.rules, choice(translate)...)
			refusal := exprs(verdict(expr.VerdictDrop, ""))
			if !p.Silent {
				refusal = exprs(verdict(expr.VerdictGoto, refusePortless(f)))
			}
			r.chains[portlessChain(p.Name, f)] = &chain{rules: append([][]expr.Any{
				rule(portlessService(f, 0), exprs(setLookup(exhaustedSet(p.Name, f))), refusal),
				rule(exprs(&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: portlessCounter}), portlessClient(f), exprs(update(meterSet(p.Name, f)))),
			}, choice(translate)...)}
			r.chains[name] = pool
		}
	}
}

func lowChain(pool string, f family) string { return poolName(pool, f.ipv6) + "-low" }

// firstPort is the first port that flows are translated to.
const firstPort = 1024

// hasLowPort matches packets of a protocol from ports below firstPort. The kernel would translate
// such a flow to another low port. There are only some hundreds of these, and once they are used
// up, the next flow would fail while tens of thousands of ports are free.
func hasLowPort(protocol byte) []expr.Any {
	return exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, protocol),
		transport(0, 2, reg1), compare(expr.CmpOpLt, binary.BigEndian.AppendUint16(nil, firstPort)...))
}

// translateHigh translates to the address in the first register, with a port of firstPort or
// above.
func translateHigh(f family) []expr.Any {
	least, most := register(32), register(36)
	return exprs(
		&expr.Immediate{Register: least, Data: binary.BigEndian.AppendUint16(nil, firstPort)},
		&expr.Immediate{Register: most, Data: []byte{0xff, 0xff}},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto), Specified: true, RegAddrMin: reg1, RegAddrMax: reg1, RegProtoMin: least, RegProtoMax: most})
}

// lateName is the name of the chain, and of the map of slots, for late flows of a shared pool.
func lateName(pool string, f family) string { return "late-" + pool + "-" + f.suffix }

// addSlots adds a map of the slots of a pool with the given addresses of one family: those of
// sources without a zone, and of each zone that has an address. It reports whether one has.
func (r *ruleset) addSlots(name string, c nat.Config, addrs []nat.PoolAddress, of func(ipv6 bool, zone string) [nat.Slots]netip.Addr) (near bool) {
	s := &set{shape: shape{isMap: true, isConcat: true}, elements: map[string]element{}}
	add := func(zone int, name string) {
		for i, a := range of(addrs[0].Address.Is6(), name) {
			key := binary.NativeEndian.AppendUint32(nil, uint32(zone))
			s.elements[string(binary.NativeEndian.AppendUint32(key, uint32(i)))] = element{data: string(a.AsSlice())}
		}
	}
	add(0, "")
	for i, z := range c.Zones {
		if slices.ContainsFunc(addrs, func(a nat.PoolAddress) bool { return a.Zone == z.Name }) {
			near = true
			add(i+1, z.Name)
		}
	}
	r.sets[name] = s
	return near
}

// zoneElements returns the zones' prefixes with the zones' positions in the list, from 1. The key
// includes the protocol, with any value, because only concatenated keys use a set type in which
// the kernel can change ranges quickly.
func zoneElements(c nat.Config, f family) map[string]element {
	elements := map[string]element{}
	for i, z := range c.Zones {
		for _, p := range z.Prefixes {
			if p.Addr().Is6() == f.ipv6 {
				key := slices.Concat(bound(p, 0), []byte{0, 0, 0, 0}, bound(p, 1), []byte{255, 0, 0, 0})
				elements[string(key)] = element{data: string(binary.NativeEndian.AppendUint32(nil, uint32(i+1)))}
			}
		}
	}
	return elements
}

// service loads destination, protocol and port into the registers from offset on.
func service(f family, offset uint32) []expr.Any {
	return exprs(
		network(f.dst, f.size, register(offset)),
		meta(expr.MetaKeyL4PROTO, register(offset+f.size)),
		transport(2, 2, register(offset+f.size+4)))
}

// clientService loads source, destination, protocol and port.
func clientService(f family) []expr.Any {
	return rule(exprs(network(f.source, f.size, register(0))), service(f, f.size))
}

func portlessChain(pool string, f family) string { return poolName(pool, f.ipv6) + "-portless" }
func refusePortless(f family) string             { return refuseChain(f) + "-portless" }

// isPortless matches the protocols without ports by nat.Portless. For most packets, the first
// comparison fails.
func isPortless() []expr.Any {
	match := exprs(meta(expr.MetaKeyL4PROTO, reg1))
	for _, protocol := range nat.NotPortless() {
		match = append(match, compare(expr.CmpOpNeq, protocol))
	}
	return match
}

// portlessService is service with port 0, for protocols without ports.
func portlessService(f family, offset uint32) []expr.Any {
	return exprs(
		network(f.dst, f.size, register(offset)),
		meta(expr.MetaKeyL4PROTO, register(offset+f.size)),
		&expr.Immediate{Register: register(offset + f.size + 4), Data: []byte{0, 0}})
}

// portlessClient is clientService with port 0, for protocols without ports.
func portlessClient(f family) []expr.Any {
	return rule(exprs(network(f.source, f.size, register(0))), portlessService(f, f.size))
}

// meter counts flows that begin. When the set is full, evaluation of the rule stops there.
func meter(pool string, f family, protocol byte) []expr.Any {
	key := register(2 * f.size)
	return rule(exprs(meta(expr.MetaKeyL4PROTO, key), &expr.Cmp{Op: expr.CmpOpEq, Register: key, Data: []byte{protocol}},
		&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: begunCounter}), clientService(f), exprs(update(meterSet(pool, f))))
}

func update(set string) expr.Any {
	return &expr.Dynset{SrcRegKey: reg1, SetName: set, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{&expr.Counter{}}}
}

// addRefusals adds the chains that refuse flows which cannot begin. In the chain that chooses the
// source, the kernel cannot send a refusal. Therefore that chain drops the first packet of a
// client to an exhausted service and adds the client to a set; the following packets are refused
// here.
func (r *ruleset) addRefusals() {
	begins := &chain{rules: [][]expr.Any{exprs(meta(expr.MetaKeyNFPROTO, reg1), setLookup(fullSet), verdict(expr.VerdictGoto, rejected))}}
	r.chains["begins"] = begins
	for _, f := range families {
		begins.rules = append(begins.rules, rule(isFamily(f), clientService(f), exprs(setLookup(refusedSet(f)), verdict(expr.VerdictGoto, rejected))))
		begins.rules = append(begins.rules, rule(isFamily(f), isPortless(), portlessClient(f), exprs(setLookup(refusedSet(f)), verdict(expr.VerdictGoto, rejected))))
		r.chains[refusePortless(f)] = &chain{rules: [][]expr.Any{
			rule(portlessClient(f), exprs(update(refusedSet(f)))),
			exprs(verdict(expr.VerdictDrop, "")),
		}}
		r.sets[refusedSet(f)] = &set{shape: shape{isConcat: true, isDynamic: true}}
		r.chains[refuseChain(f)] = &chain{rules: [][]expr.Any{
			rule(clientService(f), exprs(update(refusedSet(f)))),
			exprs(verdict(expr.VerdictDrop, "")),
		}}
	}
	r.chains[rejected] = &chain{rules: [][]expr.Any{
		exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_TCP), &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}),
		exprs(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}),
	}}
}

// refusals checks the first packets of flows that are about to leave. Packets of other flows cost
// only the check of their status.
func refusals() []expr.Any {
	const confirmed = 1 << 3 // IPS_CONFIRMED: the flow's first packet has left
	return rule(exprs(&expr.Ct{Register: reg1, Key: expr.CtKeySTATUS},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, confirmed), Xor: make([]byte, 4)},
		compare(expr.CmpOpEq, 0, 0, 0, 0)),
		exprs(verdict(expr.VerdictJump, "begins")))
}

// place fills the maps of placements with those whose pool is configured and whose address may
// still take new flows.
func (r *ruleset) place(c nat.Config, placed []nat.Placement) {
	for _, f := range families {
		for _, p := range c.Pools {
			if len(p.Family(f.ipv6)) > 0 {
				r.sets[placedMap(p.Name, f)] = &set{shape: shape{isMap: true, isConcat: true}, elements: map[string]element{}}
			}
		}
	}
	usable := map[string][]nat.PoolAddress{}
	for _, p := range placed {
		f := familyOf(p.Source.Is6())
		name := placedMap(p.Pool, f)
		s := r.sets[name]
		if s == nil {
			continue
		}
		if usable[name] == nil {
			usable[name] = c.Pool(p.Pool).Usable(f.ipv6, "")
		}
		if slices.ContainsFunc(usable[name], func(a nat.PoolAddress) bool { return a.Address == p.Address }) && p.Destination.Is6() == f.ipv6 {
			s.elements[string(append(p.Source.AsSlice(), p.Destination.AsSlice()...))] = element{data: string(p.Address.AsSlice())}
		}
	}
}

// placements returns the placements in the maps, sorted.
func (r *ruleset) placements() []nat.Placement {
	placed := []nat.Placement{}
	for name, s := range r.sets {
		pool, ok := strings.CutPrefix(name, "placed-")
		if !ok {
			continue
		}
		for key, e := range s.elements {
			source, _ := netip.AddrFromSlice([]byte(key[:len(key)/2]))
			destination, _ := netip.AddrFromSlice([]byte(key[len(key)/2:]))
			address, _ := netip.AddrFromSlice([]byte(e.data))
			placed = append(placed, nat.Placement{Pool: pool[:len(pool)-2], Source: source, Destination: destination, Address: address})
		}
	}
	slices.SortFunc(placed, func(a, b nat.Placement) int {
		return cmp.Or(cmp.Compare(a.Pool, b.Pool), a.Source.Compare(b.Source), a.Destination.Compare(b.Destination))
	})
	return placed
}

// refuse fills the sets that hold refusals.
func (r *ruleset) refuse(c nat.Config, o nat.Overload) {
	r.sets[fullSet] = &set{elements: map[string]element{}}
	for _, f := range families {
		if o.TableFull {
			r.sets[fullSet].elements[string([]byte{f.nfproto})] = element{}
		}
		for _, p := range c.Pools {
			if len(p.Family(f.ipv6)) > 0 {
				r.sets[exhaustedSet(p.Name, f)] = &set{shape: shape{isConcat: true}, elements: map[string]element{}}
			}
		}
	}
	for _, e := range o.Exhausted {
		if s := r.sets[exhaustedSet(e.Pool, familyOf(e.Destination.Is6()))]; s != nil {
			s.elements[serviceKey(e.Service)] = element{}
		}
	}
}

func serviceKey(s nat.Service) string {
	key := append(s.Destination.AsSlice(), s.Protocol, 0, 0, 0)
	return string(append(binary.BigEndian.AppendUint16(key, s.Port), 0, 0))
}

// decodeService decodes the end of a key.
func decodeService(key []byte) (s nat.Service) {
	n := len(key) - 8
	s.Destination, _ = netip.AddrFromSlice(key[:n])
	s.Protocol, s.Port = key[n], binary.BigEndian.Uint16(key[n+4:])
	return s
}

// decodeUse decodes the key of a meter: source and service.
func decodeUse(key []byte, f family) (u nat.Use, ok bool) {
	n := int(f.size)
	if len(key) != 2*n+8 {
		return u, false
	}
	u.Source, _ = netip.AddrFromSlice(key[:n])
	u.Service = decodeService(key[n:])
	return u, true
}

// frees reports whether a change ends the refusal of a service.
func frees(todo map[string]*change) bool {
	for name, c := range todo {
		if strings.HasPrefix(name, "full-") {
			for key := range c.remove {
				if _, stays := c.add[key]; !stays {
					return true
				}
			}
		}
	}
	return false
}

// withOwnSets returns a copy whose sets can be replaced.
func (r *ruleset) withOwnSets() *ruleset {
	out := *r
	out.sets = maps.Clone(r.sets)
	return &out
}
