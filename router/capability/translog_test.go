package capability

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/egress/translog"
	"github.com/isthmus-net/isthmus/router/fault"
)

func TestLogConditions(t *testing.T) {
	for _, k := range []struct {
		status translog.Status
		want   []string
	}{
		{translog.Status{Records: 7, Overruns: 3, Unheard: 2}, nil},
		{translog.Status{Problems: []string{"run 3: damaged", "writing: no space left on device"}}, []string{"TranslationLogDamaged"}},
		{translog.Status{Damaged: 1}, []string{"TranslationLogIncomplete"}},
		{translog.Status{Lost: 5, Problems: []string{"x"}}, []string{"TranslationLogDamaged", "TranslationLogIncomplete"}},
	} {
		got := logConditions(k.status)
		if len(got) != len(k.want) {
			t.Fatalf("%+v: %v, want %v", k.status, got, k.want)
		}
		for i, c := range got {
			if c.Type != k.want[i] || c.Message == "" || c.Severity == "" {
				t.Errorf("%+v: %v, want %v", k.status, c, k.want[i])
			}
		}
	}
}

// TestTranslatedFlowWithoutPorts: a flow of a protocol without ports is shown by its name, without
// a port 0.
func TestTranslatedFlowWithoutPorts(t *testing.T) {
	for protocol, want := range map[uint8]string{50: "esp 10.0.0.1 192.0.2.1 198.51.100.1", 47: "gre 10.0.0.1 192.0.2.1 198.51.100.1", 17: "udp 10.0.0.1:0 192.0.2.1:0 198.51.100.1:0", 99: "99 10.0.0.1 192.0.2.1 198.51.100.1"} {
		at := func(s string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(s), 0) }
		f := translatedFlow(translog.Record{Protocol: protocol, Inside: at("10.0.0.1"), Outside: at("192.0.2.1"), Destination: at("198.51.100.1")})
		if got := f.Protocol + " " + f.Inside + " " + f.Outside + " " + f.Destination; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if err := unpooled(false, netip.MustParseAddr("203.0.113.77"), time.Now()); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("%v", err)
	}
}
