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
	"github.com/isthmus-net/isthmus/router/platform"
)

// keepFacts reads facts again and again: a public address can move. A failed reading leaves the former facts.
func (b *Boot) keepFacts(ctx context.Context, reader platform.Reader) {
	for ctx.Err() == nil {
		pause := b.o.Refresh
		if !b.readFacts(ctx, reader) {
			b.mu.Lock()
			if pause = min(factsRetry, b.o.Refresh); b.read.IsZero() {
				pause = time.Second // the network is about to come
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
			b.o.Log.Warn("the platform's facts could not be read; those that were read before stay", "err", err)
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

// noteInstance notes on which machine the state is. On another one than at first, it is a copy, or its disk was moved.
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
		b.o.Log.Warn("noting the machine", "err", err)
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

// interfaceOf returns the kernel interface with a hardware address. Of two, as a virtual function and the interface above it have one, it is that with addresses.
func interfaceOf(mac string, all []net.Interface, addresses func(net.Interface) int) string {
	best, most := "", -1
	for _, i := range all {
		if i.HardwareAddr.String() != mac {
			continue
		}
		if n := addresses(i); n > most {
			best, most = i.Name, n
		}
	}
	return best
}

// Status returns what is known of the platform; nil: nothing is.
func (b *Boot) Status() *isthmusv1.PlatformStatus {
	b.mu.Lock()
	f, read := b.facts, b.read
	b.mu.Unlock()
	if read.IsZero() {
		return nil
	}
	s := &isthmusv1.PlatformStatus{Platform: string(f.Platform), Instance: f.Instance, Region: f.Region, Zone: f.Zone, Type: f.Type, Read: timestamppb.New(read)}
	cards, _ := net.Interfaces()
	for _, n := range f.NICs {
		i := &isthmusv1.PlatformInterface{Mac: n.MAC, Mtu: uint32(n.MTU), Name: interfaceOf(n.MAC, cards, func(i net.Interface) int { list, _ := i.Addrs(); return len(list) })}
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

// Conditions tells what of the first boot and of the platform a user should know.
func (b *Boot) Conditions() (out []*isthmusv1.Condition) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.damaged != nil {
		out = append(out, &isthmusv1.Condition{Type: "FirstBootUnknown", Severity: "warning", Since: timestamppb.New(b.began),
			Message: b.damaged.Error() + "; user-data is not used: apply a document"})
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
		out = append(out, &isthmusv1.Condition{Type: "FactsOld", Severity: "warning", Since: timestamppb.New(b.factsBad), Message: age + ": " + b.factsErr.Error()})
	}
	if b.rec.Other != "" {
		out = append(out, &isthmusv1.Condition{Type: "InstanceChanged", Severity: "error", Since: timestamppb.New(b.rec.Since),
			Message: fmt.Sprintf("this state was made on instance %s and is on %s: when it is a copy, both nodes have the same keys: set new secrets on one of them and `isthmus authority renew`, which ends this condition", b.rec.Instance, b.rec.Other)})
	}
	return out
}

// address returns the host and port under which the first admin reaches the API, as far as that is known: the first public address, else the first one.
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
