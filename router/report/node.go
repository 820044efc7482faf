package report

import (
	"strings"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"errors"
	"fmt"
	"time"

	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/store"
)

// Free space in bytes for documents, secrets and the audit log: low, and too little for a large
// document.
const (
	lowSpace = 16 << 20
	noSpace  = 2 << 20
)

func (r *Report) roomConditions() []*isthmusv1.Condition {
	bytes, readOnly, err := r.Store.Room()
	switch {
	case err != nil:
		return []*isthmusv1.Condition{condition.StateNotWritable.Error(r.started, "%v", err)}
	case readOnly:
		return []*isthmusv1.Condition{condition.StateNotWritable.Error(r.started, "the file system of the state directory is read-only: the present configuration stays, changes are refused")}
	case bytes < lowSpace:
		severity := condition.Warning
		if bytes < noSpace {
			severity = condition.Error
		}
		return []*isthmusv1.Condition{condition.StateFull.With(severity, r.started, "%d KiB are free on the file system of the state directory: below a minimum, changes are refused", bytes>>10)}
	}
	return nil
}

// status returns the state of the node as a whole.
func (r *Report) status() *isthmusv1.SystemStatus {
	d := r.Documents.Status()
	s := &isthmusv1.SystemStatus{
		Node: d.Target.Node.Name, Version: r.Version, Started: stamp(r.started),
		Generation: d.Present.Generation, AppliedGeneration: d.Applied, ConfirmUntil: stamp(d.Present.ConfirmBy),
		Capabilities: r.Kernel(),
	}
	c := r.Counters()
	s.Counters = &isthmusv1.Counters{
		ViciWrites: c.Vici, NetlinkWrites: c.Netlink, NftablesTransactions: c.NFTables, WireguardWrites: c.WireGuard,
		BgpWrites: c.BGP, BgpStarts: c.BGPStarts,
	}
	if r.Platform != nil {
		s.Platform = r.Platform()
	}
	s.Conditions = limited(r.allConditions())
	s.Summary = r.summary()
	return s
}

// allConditions returns the conditions of the node and of its objects.
func (r *Report) allConditions() []*isthmusv1.Condition {
	return append(r.nodeConditions(), r.objectConditions()...)
}

// nodeConditions returns the conditions of the node and of its capabilities, without those of
// tunnels, peers and routes.
func (r *Report) nodeConditions() (out []*isthmusv1.Condition) {
	d := r.Documents.Status()
	if d.Invalid != nil {
		out = append(out, condition.DocumentUnusable.Error(r.started, "%v; the present configuration stays: correct the cause and apply a document", d.Invalid))
	}
	out = append(out, r.startConditions(d)...)
	out = append(out, secretConditions(d)...)
	if r.Notices != nil {
		out = append(out, r.Notices()...)
	}
	if newest := r.Store.Newest(); newest > d.Present.Generation {
		c := condition.DocumentDamaged.Error(r.started, "generation %d cannot be read, and the node has generation %d instead: apply the document again", newest, d.Present.Generation)
		if _, err := r.Store.Revision(newest); errors.Is(err, store.ErrNewer) {
			c = condition.DocumentNewer.Error(r.started, "generation %d was %v; the node has generation %d instead", newest, store.ErrNewer, d.Present.Generation)
		}
		out = append(out, c)
	}
	out = append(out, r.roomConditions()...)
	for _, err := range r.Store.Damage() {
		kind := condition.StoreDamaged
		if errors.Is(err, store.ErrNewer) {
			kind = condition.StoreNewer
		}
		out = append(out, kind.Warning(r.started, "%v", err))
	}
	if !d.Present.ConfirmBy.IsZero() {
		generation, former := d.Present.Generation, formerly(d.Present.RevertTo)
		c := condition.NotConfirmed.Warning(d.Present.Time, "generation %d reverts to %s at %s unless `isthmus confirm %[1]d` is called", generation, former, d.Present.ConfirmBy.UTC().Format(time.RFC3339))
		switch {
		case d.Reverted:
			c = condition.NotConfirmed.Error(d.Present.Time, "generation %d was not confirmed, and %s is carried out again, but cannot be stored: %v", generation, former, d.Stuck)
		case d.Stuck != nil:
			c = condition.NotConfirmed.Error(d.Present.Time, "generation %d was not confirmed, and going back to %s fails: %v", generation, former, d.Stuck)
		}
		out = append(out, c)
	}
	out = append(out, r.charonConditions()...)
	out = append(out, r.guardConditions()...)
	out = append(out, interfaceConditions(r.Observed.Target(), r.Observed.Machine())...)
	out = append(out, wayConditions(r.Observed.Target(), r.Observed.Machine())...)
	for _, c := range r.Capabilities {
		if c.Conditions != nil {
			out = append(out, c.Conditions()...)
		}
	}
	for _, o := range r.Applied.Failures() {
		c := condition.NotApplied.Error(o.Since, "%s: %v", o.Key, o.Err)
		if kind, name, ok := strings.Cut(o.Key, "/"); ok {
			c.Object = kind + " " + name
		}
		out = append(out, c)
	}
	return out
}

// formerly describes the generation that a document goes back to.
func formerly(generation uint64) string {
	if generation == 0 {
		return "no document"
	}
	return fmt.Sprint(generation)
}

// startConditions reports why the present document is not fully applied.
func (r *Report) startConditions(d document.Status) []*isthmusv1.Condition {
	switch {
	case d.Safe:
		return []*isthmusv1.Condition{condition.SafeStart.Error(r.started, "the daemon was started with -safe and carries nothing out; what runs stays as it is: apply a document or `isthmus rollback`, then start it without -safe")}
	case d.Dying:
		instead := "nothing is carried out, and what runs stays as it is"
		if d.Held != nil {
			instead = fmt.Sprintf("generation %d is carried out in its place", d.Held.Generation)
		}
		return []*isthmusv1.Condition{condition.GenerationHeldBack.Error(r.started, "the daemon died again and again while it carried out generation %d, and %s: apply another document, or `isthmus rollback`", d.Present.Generation, instead)}
	}
	return nil
}

// secretConditions reports secrets that the document names and that are not stored.
func secretConditions(d document.Status) (out []*isthmusv1.Condition) {
	for _, u := range d.Missing {
		one := condition.SecretMissing.Error(d.Present.Time, "%s: secret %s is not stored, and what uses it waits for it: `isthmus secret set %s`", u.Path, u.Name, u.Name)
		one.Object = "secret " + u.Name
		out = append(out, one)
	}
	return out
}
