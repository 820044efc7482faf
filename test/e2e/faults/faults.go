// Package faults says what a node must show of each fault: in `isthmus status`, in words that lead
// to its remedy, in the metrics and in the events, and that all of them end when it is repaired.
package faults

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/condition"
)

// Fault is something that goes wrong, as a user would say it.
type Fault struct {
	What string
	// Kind is the condition that names it, and Words are in its message.
	Kind  *condition.Kind
	Words []string
}

// InVM are the faults that need IPsec or a clock of one's own. Package e2e makes them.
var InVM = []Fault{
	{"an IPsec peer has another pre-shared key", condition.TunnelDown, []string{"AUTHENTICATION_FAILED", "isthmus secret set k"}},
	{"an IPsec peer has other IKE proposals", condition.TunnelDown, []string{"NO_PROPOSAL_CHOSEN", "our IKE proposals aes256gcm16-prfsha384-ecp384"}},
	{"ESP is filtered, IKE is not", condition.TunnelSuspect, []string{"ESP, IP protocol 50, is filtered", "udpEncapsulation"}},
	{"charon has ended", condition.CharonUnreachable, []string{"established tunnels go on until their keys expire", "systemctl start strongswan"}},
	{"the clock is two days behind", condition.ClockWrong, []string{"set the clock"}},
	{"the certificate of a client ends soon", condition.ClientsExpire, []string{"short (reader)", "isthmus client renew"}},
	{"the last certificate of an admin has expired", condition.ClientExpires, []string{"ended at", "as root on the node"}},
}

// Node is a node that faults happen to.
type Node struct {
	CLI     func(ctx context.Context, args ...string) (string, error)
	Metrics func(ctx context.Context) (string, error)
}

// Named returns nil when `isthmus status` names the fault and its remedy.
func (n Node) Named(ctx context.Context, f Fault) error {
	out, err := n.CLI(ctx, "status")
	if err != nil {
		return err
	}
	for _, word := range append([]string{f.Kind.Name, f.Kind.Remedy[:min(20, len(f.Kind.Remedy))]}, f.Words...) {
		if !strings.Contains(out, word) {
			return fmt.Errorf("status does not say %q:\n%s", word, out)
		}
	}
	return nil
}

// Measured returns nil when the metrics have the condition of the fault, or, if it is over, when
// they do not have it.
func (n Node) Measured(ctx context.Context, f Fault, over bool) error {
	out, err := n.Metrics(ctx)
	if err != nil {
		return err
	}
	series := regexp.MustCompile(`(?m)^isthmus_condition\{.*type="` + f.Kind.Name + `".*\} 1$`)
	present := series.MatchString(out)
	if present == over {
		return fmt.Errorf("the metrics have isthmus_condition of %s: %v", f.Kind.Name, present)
	}
	return nil
}

// Recorded returns nil when the events since a time have the beginning of the fault's condition,
// and its end if it is over.
func (n Node) Recorded(ctx context.Context, f Fault, since time.Time, over bool) error {
	begin, end := "ConditionBegan", "ConditionEnded"
	switch f.Kind {
	case condition.TunnelDown, condition.TunnelSuspect:
		begin, end = f.Kind.Name, "TunnelUp"
	case condition.SessionDown:
		begin, end = f.Kind.Name, "SessionUp"
	}
	types := []string{"--type", f.Kind.Name}
	if begin == f.Kind.Name {
		types = append(types, "--type", end)
	}
	out, err := n.CLI(ctx, append([]string{"get", "events", "--since", since.UTC().Format(time.RFC3339)}, types...)...)
	if err != nil {
		return err
	}
	for _, word := range []string{begin, f.Kind.Name} {
		if !strings.Contains(out, word) {
			return fmt.Errorf("the events have no %s:\n%s", word, out)
		}
	}
	if _, after, _ := strings.Cut(out, begin); over && !strings.Contains(after, end) {
		return fmt.Errorf("the events have no %s:\n%s", end, out)
	}
	return nil
}
