package firstboot

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/platform"
	"github.com/isthmus-net/isthmus/router/spec"
)

// keepFacts reads facts periodically, because a public address can move. A failed read keeps the
// former facts.
func (b *Boot) keepFacts(ctx context.Context, reader platform.Reader) {
	for ctx.Err() == nil {
		pause := b.o.Refresh
		if !b.readFacts(ctx, reader) {
			b.mu.Lock()
			if pause = min(factsRetry, b.o.Refresh); b.read.IsZero() {
				pause = time.Second // the network may come up soon
				if time.Since(b.began) > b.o.Deadline {
					pause = factsRetry
				}
			}
			b.mu.Unlock()
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

func (b *Boot) readFacts(ctx context.Context, reader platform.Reader) bool {
	ctx, cancel := context.WithTimeout(ctx, factsWithin)
	defer cancel()
	now, err := reader.Facts(ctx)
	b.mu.Lock()
	if err != nil {
		if b.factsErr == nil || b.factsErr.Error() != err.Error() {
			b.o.Log.Warn("the platform's facts could not be read; the former ones stay", "err", err)
		}
		if b.factsErr == nil {
			b.factsBad = time.Now()
		}
		b.factsErr = err
		b.mu.Unlock()
		return false
	}
	former, first := b.facts, b.read.IsZero()
	b.facts, b.read, b.factsErr = now, time.Now(), nil
	rec := b.rec
	b.mu.Unlock()
	b.plan(ctx, rec.Addresses, addresses(now, cards()))
	b.readyOnce.Do(func() { close(b.ready) })
	if first {
		b.o.Log.Info("the platform's facts", "instance", now.Instance, "zone", now.Zone, "type", now.Type, "public addresses", publicAddresses(now))
	} else if !reflect.DeepEqual(former, now) {
		b.o.Log.Warn("the platform's facts have changed", "public addresses", publicAddresses(now), "before", publicAddresses(former))
	}
	if first || !reflect.DeepEqual(former, now) {
		b.o.Changed()
		b.show()
	}
	b.noteInstance(rec, now.Instance)
	return true
}

// plan gives the platform's addresses to the node.
func (b *Boot) plan(ctx context.Context, former, now spec.Platform) {
	err := b.node.SetFacts(ctx, now)
	b.mu.Lock()
	if err != nil && (b.unusable == nil || b.unusable.Error() != err.Error()) {
		b.o.Log.Error("the document cannot be used with the platform's facts; the node keeps its configuration", "err", err)
	}
	b.unusable = err
	same := reflect.DeepEqual(former, now)
	if former.Known && !reflect.DeepEqual(former.Public, now.Public) {
		b.moved, b.movedAt = fmt.Sprintf("public addresses have changed: they are %v, and were %v", pairs(now), pairs(former)), time.Now()
		b.o.Log.Warn("public addresses have changed", "now", pairs(now), "before", pairs(former))
	}
	b.mu.Unlock()
	if same || b.damaged != nil {
		return
	}
	if err := b.save(func(r *record) { r.Addresses = now }); err != nil {
		b.o.Log.Warn("storing the platform's facts for the next start failed", "err", err)
	}
}

func pairs(p spec.Platform) (out []string) {
	for a, public := range p.Public {
		out = append(out, a.String()+"="+public.String())
	}
	slices.Sort(out)
	return out
}

// card is a kernel interface.
type card struct {
	name, mac string
	addresses int
}

func cards() (out []card) {
	all, _ := net.Interfaces()
	for _, i := range all {
		list, _ := i.Addrs()
		out = append(out, card{i.Name, i.HardwareAddr.String(), len(list)})
	}
	return out
}

// addresses returns the facts that documents may use.
func addresses(f platform.Facts, all []card) spec.Platform {
	p := spec.Platform{Known: true, Interfaces: map[string]netip.Addr{}, Public: map[netip.Addr]netip.Addr{}}
	for _, n := range f.NICs {
		if name := interfaceOf(n.MAC, all); name != "" && len(n.Addresses) > 0 {
			p.Interfaces[name] = n.Addresses[0].Address
		}
		for _, a := range n.Addresses {
			if a.Public.IsValid() {
				p.Public[a.Address] = a.Public
			}
		}
	}
	return p
}

// noteInstance records the machine that the state is on. On another machine than before, the state
// is a copy, or its disk was moved.
func (b *Boot) noteInstance(rec record, instance string) {
	var err error
	switch {
	case b.damaged != nil || instance == "":
	case rec.Instance == "":
		err = b.save(func(r *record) { r.Instance = instance })
	case rec.Instance == instance && rec.Other != "":
		err = b.save(func(r *record) { r.Other, r.Since, r.Authority = "", time.Time{}, "" })
	case rec.Instance == instance:
	case rec.Other != instance:
		b.o.Log.Error("the state directory is on another machine than it was", "instance", instance, "it was", rec.Instance)
		err = b.save(func(r *record) { r.Other, r.Since, r.Authority = instance, time.Now(), b.o.Authority() })
	case b.o.Authority() != rec.Authority:
		err = b.save(func(r *record) { r.Instance, r.Other, r.Since, r.Authority = instance, "", time.Time{}, "" })
	}
	if err != nil {
		b.o.Log.Warn("storing the machine's instance failed", "err", err)
	}
}

// publicAddresses returns the public addresses of the machine, each with the address behind it.
func publicAddresses(f platform.Facts) (out []string) {
	for _, n := range f.NICs {
		for _, a := range n.Addresses {
			if a.Public.IsValid() {
				out = append(out, a.Address.String()+"="+a.Public.String())
			}
		}
	}
	return out
}

// movedFor is how long a condition reports a change of public addresses.
const movedFor = 24 * time.Hour

// interfaceOf returns the kernel interface with a hardware address. If two have it, such as a
// virtual function and the interface above it, it returns the one with addresses.
func interfaceOf(mac string, all []card) string {
	best, most := "", -1
	for _, c := range all {
		if c.mac == mac && c.addresses > most {
			best, most = c.name, c.addresses
		}
	}
	return best
}

// Status returns the platform's facts; nil: there are none.
func (b *Boot) Status() *isthmusv1.PlatformStatus {
	b.mu.Lock()
	f, read := b.facts, b.read
	b.mu.Unlock()
	if read.IsZero() {
		return nil
	}
	s := &isthmusv1.PlatformStatus{Platform: string(f.Platform), Instance: f.Instance, Region: f.Region, Zone: f.Zone, Type: f.Type, Read: timestamppb.New(read)}
	all := cards()
	for _, n := range f.NICs {
		i := &isthmusv1.PlatformInterface{Mac: n.MAC, Mtu: uint32(n.MTU), Name: interfaceOf(n.MAC, all)}
		for _, a := range n.Addresses {
			text := a.Address.String()
			if a.Public.IsValid() {
				text += "=" + a.Public.String()
			}
			i.Addresses = append(i.Addresses, text)
		}
		for _, p := range n.Subnets {
			i.Subnets = append(i.Subnets, p.String())
		}
		if n.Router.IsValid() {
			i.Router = n.Router.String()
		}
		s.Interfaces = append(s.Interfaces, i)
	}
	return s
}

// Conditions returns the conditions of the first boot and of the platform.
func (b *Boot) Conditions() (out []*isthmusv1.Condition) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.damaged != nil {
		out = append(out, condition.FirstBootUnknown.Warning(b.began, "%v; user-data is not used: apply a document", b.damaged))
	}
	for _, c := range []*isthmusv1.Condition{b.trouble, b.report} {
		if c != nil {
			out = append(out, c)
		}
	}
	if b.factsErr != nil {
		age := "the platform's facts have never been read"
		if !b.read.IsZero() {
			age = fmt.Sprintf("the platform's facts are %v old", time.Since(b.read).Round(time.Second))
		}
		out = append(out, condition.FactsOld.Warning(b.factsBad, "%s", age+": "+b.factsErr.Error()))
	}
	if b.unusable != nil {
		out = append(out, condition.FactsUnusable.Error(b.read, "%s", "the document cannot be used with the platform's facts, and the node keeps its configuration: "+b.unusable.Error()))
	}
	if b.moved != "" && time.Since(b.movedAt) < movedFor {
		out = append(out, condition.PublicAddressChanged.Warning(b.movedAt, "%s", b.moved+"; peers and partners that use a former address cannot reach the node"))
	}
	if b.rec.Other != "" {
		out = append(out, condition.InstanceChanged.Error(b.rec.Since, "this state was made on instance %s and is on %s: if it is a copy, both nodes have the same keys: set new secrets on one of them and run `isthmus authority renew`, which ends this condition", b.rec.Instance, b.rec.Other))
	}
	return out
}

// address returns the host and port of the API for the first admin, as far as known: the first
// public address, else the first address.
func (b *Boot) address() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var best netip.Addr
	for _, n := range b.facts.NICs {
		if i := slices.IndexFunc(n.Addresses, func(a platform.Address) bool { return a.Public.IsValid() }); i >= 0 {
			return netip.AddrPortFrom(n.Addresses[i].Public, b.o.Port).String()
		}
		if !best.IsValid() && len(n.Addresses) > 0 {
			best = n.Addresses[0].Address
		}
	}
	if best.IsValid() && b.o.Port != 0 {
		return netip.AddrPortFrom(best, b.o.Port).String()
	}
	return ""
}
