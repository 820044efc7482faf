package capability

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/test/root"
)

// TestNameConditions: a name with new addresses in each answer, one with addresses that no name may
// stand for, and an attachment with too many new addresses have a condition with a remedy each.
// Ring: namespace; needs root for port 53.
func TestNameConditions(t *testing.T) {
	root.Need(t, "port 53")
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		for n, buffer := byte(0), make([]byte, 1024); ; n++ {
			size, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buffer[:size]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			address := [4]byte{198, 51, 100, n}
			if strings.HasPrefix(strings.ToLower(q.Name.String()), "meta") {
				address = [4]byte{169, 254, 169, 254}
			}
			m.Header, m.Additionals = dnsmessage.Header{ID: m.ID, Response: true}, nil
			if q.Type == dnsmessage.TypeA && strings.HasPrefix(strings.ToLower(q.Name.String()), "many") {
				for i := range byte(200) {
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60}, Body: &dnsmessage.AResource{A: [4]byte{11, 0, n, i}}})
				}
			} else if q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class}, Body: &dnsmessage.AResource{A: address}}}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(out, from)
			}
		}
	}()
	target := plan.Target{NAT: nat.Config{Policies: []nat.Policy{{Name: "a", Names: []string{"meta.example", "turns.example", "*.any.example"}}}}}
	names := dns.New(dns.Options{Changed: func(bool) {}, Apply: func(context.Context) error { return nil }, Log: slog.New(slog.DiscardHandler)})
	names.Set(egress.DNS{Floor: 20 * time.Millisecond, Resolvers: []netip.AddrPort{netip.MustParseAddrPort(conn.LocalAddr().String())},
		Proxy: []egress.Listener{{Address: netip.MustParseAddr("127.53.53.20"), Interface: "lo"}}}, live.Of(&target, live.Facts{}).Names, nil)
	o := observe.New(observe.Options{Health: health.New(health.Options{}), Proxies: health.New(health.Options{}), Names: names, Bell: &bell.Bell{}, Log: slog.New(slog.DiscardHandler)})
	o.Use(nil, target)
	r := Names{Resolver: names, Observed: o, Conflicts: func() []live.Conflict { return nil }}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { names.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	spoke, err := net.Dial("udp", "127.53.53.20:53")
	if err != nil {
		t.Fatal(err)
	}
	defer spoke.Close()
	asked := 0
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		asked++
		query := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(fmt.Sprintf("many%d.any.example.", asked)), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
		if packed, err := query.Pack(); err == nil {
			_, _ = spoke.Write(packed) // it may not listen yet
		}
		got := ""
		for _, c := range r.conditions() {
			got += c.Type + ": " + c.Message + "\n"
		}
		if strings.Contains(got, "NameDiffers: name turns.example of policies a") && strings.Contains(got, "egress.dnsProxy") &&
			strings.Contains(got, "NewNamesLimited: the DNS proxy has refused ") && strings.Contains(got, "behind lo: ") &&
			strings.Contains(got, "AddressesRefused: name meta.example of policies a: 169.254.169.254 and others are refused") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("conditions: %s", got)
		}
	}
	if _, err := names.Resolve(t.Context(), "meta.example"); err == nil || !strings.Contains(err.Error(), "which no name may stand for") {
		t.Errorf("a probe gets %v", err)
	}
}
