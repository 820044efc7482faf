package report

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/echo"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/test/crowd"
	"github.com/isthmus-net/isthmus/tunnel"
)

// uplink is a machine with an address.
type uplink struct{ machine }

func (uplink) Surroundings() (fib.Surroundings, error) {
	return fib.Surroundings{Addresses: []fib.Assigned{{Interface: "up0", Prefix: netip.MustParsePrefix("192.0.2.1/24")}}}, nil
}

func inside(pairs ...string) (out []tunnel.Inside) {
	for _, p := range pairs {
		local, remote, _ := strings.Cut(p, " ")
		out = append(out, tunnel.Inside{Local: netip.MustParsePrefix(local), Remote: netip.MustParseAddr(remote)})
	}
	return out
}

// pingable returns a Report for four tunnels.
func pingable(t *testing.T, c nat.Config, ping func(context.Context, echo.Request, func(echo.Result) error) error) *Report {
	o := observer(t, uplink{}, c)
	o.Use(nil, plan.Target{NAT: c, Tunnels: []tunnel.Config{
		{Name: "a", Interface: "tun0", Inside: inside("172.31.0.1/30 172.31.0.2")},
		{Name: "both", Interface: "t-both", Inside: inside("169.254.1.1/30 169.254.1.2", "fd00::1/127 fd00::")},
		{Name: "none", Interface: "t-none", Inside: inside("169.254.2.1/30 169.254.2.2")},
		{Name: "off", Interface: "t-off", Inside: inside("169.254.3.1/30 169.254.3.2"), Disabled: true},
	}})
	o.ReadMachine()
	return New(Options{Observed: o, Ping: ping, Log: slog.New(slog.DiscardHandler)})
}

func request(address, tunnel string) *isthmusv1.PingRequest {
	return &isthmusv1.PingRequest{Address: address, Tunnel: tunnel, Count: 1, Interval: durationpb.New(time.Second), Size: 56}
}

// TestPingRequests checks what a request asks of the sender, and how its results are reported.
func TestPingRequests(t *testing.T) {
	var got echo.Request
	r := pingable(t, nat.Config{}, func(_ context.Context, q echo.Request, each func(echo.Result) error) error {
		got = q
		if q.Interface == "t-none" {
			return echo.ErrNoInterface
		}
		return errors.Join(each(echo.Result{Sequence: 1, From: q.To, RoundTrip: time.Millisecond}), each(echo.Result{Sequence: 2, Err: errors.New("no")}))
	})
	for _, k := range []struct{ address, tunnel, from, iface string }{
		{"10.1.2.3", "", "", ""}, {"fd77::1", "", "", ""}, {"10.1.2.3", "a", "172.31.0.1", "tun0"},
		{"10.1.2.3", "both", "169.254.1.1", "t-both"}, {"fd77::1", "both", "fd00::1", "t-both"}, {"192.0.2.254", "", "", ""},
	} {
		want := echo.Request{To: netip.MustParseAddr(k.address), Interface: k.iface, Count: 7, Interval: 300 * time.Millisecond, Size: 100, DontFragment: true}
		if k.from != "" {
			want.From = netip.MustParseAddr(k.from)
		}
		var replies []*isthmusv1.PingReply
		err := r.Ping(t.Context(), &isthmusv1.PingRequest{Address: k.address, Tunnel: k.tunnel, Count: 7, Interval: durationpb.New(300 * time.Millisecond), Size: 100, DontFragment: true}, func(m *isthmusv1.PingReply) error {
			replies = append(replies, m)
			return nil
		})
		if err != nil || got != want {
			t.Errorf("%v: %+v, %v, want %+v", k, got, err, want)
		}
		if len(replies) != 2 || replies[0].Sequence != 1 || replies[0].Address != k.address || replies[0].RoundTrip.AsDuration() != time.Millisecond || replies[0].Error != "" ||
			replies[1].Sequence != 2 || replies[1].Address != "" || replies[1].RoundTrip != nil || replies[1].Error != "no" {
			t.Errorf("%v", replies)
		}
	}
	for _, k := range []struct {
		address, tunnel string
		err             error
		want            string
	}{
		{"10.1.2.3", "b", fault.ErrNoTunnel, `tunnel "b": not found`},
		{"10.1.2.3", "off", fault.ErrPrecondition, "disabled in the document; enable it"},
		{"10.1.2.3", "none", fault.ErrPrecondition, "does not have its interface t-none yet"},
		{"fd77::1", "a", api.ErrInvalid, "tunnel a: it has no inside address of IPv6, the family of fd77::1; add one"},
		{"192.0.2.255", "", api.ErrInvalid, "broadcast address of 192.0.2.0/24 at interface up0"},
	} {
		err := r.Ping(t.Context(), request(k.address, k.tunnel), func(*isthmusv1.PingReply) error { return nil })
		if !errors.Is(err, k.err) || !strings.Contains(err.Error(), k.want) {
			t.Errorf("%s by %q: %v, want %q", k.address, k.tunnel, err, k.want)
		}
	}
}

// TestPingPassesTheRules checks that the rules of the node let its own pings and their answers
// pass, although no other packets may reach the node. Ring: namespace.
func TestPingPassesTheRules(t *testing.T) {
	c := crowd.New(t, 1)
	config := c.Config
	config.Input.Drop = true
	if err := c.Driver.Apply(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	c.Client.Run("ip route add local 10.77.0.0/16 dev lo")
	c.Server.Run("ip route add unreachable 198.51.101.0/24\nsysctl -qw net.ipv4.ip_forward=1")
	c.Router.Run("ip route add 198.51.101.0/24 via 192.0.2.254")
	r := pingable(t, config, echo.Ping)
	for _, k := range []struct{ address, tunnel, want string }{
		{"172.31.0.2", "a", ""},
		{"10.0.0.7", "a", ""},
		{"10.0.0.7", "", ""},
		{"198.51.100.1", "", ""},
		{"198.51.101.1", "", "destination unreachable: the host does not answer"},
		// The source does not belong to the attachment.
		{"10.77.0.1", "a", "no answer within 1s"},
	} {
		var got *isthmusv1.PingReply
		var err error
		c.Router.Do(func() {
			err = r.Ping(t.Context(), request(k.address, k.tunnel), func(m *isthmusv1.PingReply) error { got = m; return nil })
		})
		if err != nil || got.GetError() != k.want || (k.want == "") != (got.GetAddress() == k.address) {
			t.Errorf("%s by %q: %v, %v, want %q", k.address, k.tunnel, got, err, k.want)
		}
	}
}
