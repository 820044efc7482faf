package capability

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/door"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/event/export"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/ports"
)

func all() []Capability {
	return []Capability{
		Names{Resolver: dns.New(dns.Options{})}.Capability(), Probes{}.Capability(), Ports{Keeper: &ports.Keeper{}}.Capability(), Translog{}.Capability(),
		Takeover{Runner: &takeover.Runner{}}.Capability(), SSH(func([]string) error { return nil }), NewAllowances(AllowanceOptions{}).Capability(),
		Metrics(door.New(door.Options{})), Export(export.New(export.Options{})),
	}
}

// TestCapabilities: the section of each is a field of the document, its part belongs to no other
// one, and so do its conditions.
func TestCapabilities(t *testing.T) {
	owner, jobs := map[*condition.Kind]string{}, map[string]string{}
	for _, c := range all() {
		m := (&isthmusv1.Spec{}).ProtoReflect().Descriptor()
		for _, name := range strings.Split(c.Section, ".") {
			if m == nil {
				t.Errorf("%s: section %s goes through a field that is not a message", c.Name, c.Section)
				break
			}
			f := m.Fields().ByName(protoreflect.Name(name))
			if f == nil {
				t.Errorf("%s: the document has no field %s of %s", c.Name, name, c.Section)
				break
			}
			m = f.Message()
		}
		for _, k := range c.Kinds {
			if other := owner[k]; other != "" {
				t.Errorf("condition %s belongs to %s and %s", k.Name, other, c.Name)
			}
			if owner[k] = c.Name; !slices.Contains(condition.All, k) {
				t.Errorf("%s: condition %s is not in the registry", c.Name, k.Name)
			}
		}
		if (len(c.Kinds) > 0) != (c.Conditions != nil) {
			t.Errorf("%s has %d kinds of conditions, and reports some: %v", c.Name, len(c.Kinds), c.Conditions != nil)
		}
		for _, j := range c.Jobs {
			if other := jobs[j.Key]; other != "" || j.Part == nil || j.Do == nil {
				t.Errorf("%s: job %s, which %s has too", c.Name, j.Key, other)
			}
			jobs[j.Key] = c.Name
			j.Part(&plan.Target{NAT: nat.Config{}})
		}
	}
}
