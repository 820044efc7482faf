package gobgp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

var sample = []update{
	{prefix("10.1.0.0/16"), []path{
		{7, addr("169.254.0.11"), []uint32{65001, 4200000000}, false},
		{8, addr("169.254.0.12"), []uint32{}, true},
	}},
	{prefix("0.0.0.0/0"), nil},
	{prefix("2001:db8::/32"), []path{{7, addr("fd00::1"), []uint32{65001}, false}}},
	{prefix("10.2.0.0/16"), []path{{8, netip.Addr{}, []uint32{}, false}}},
	{prefix("::/0"), []path{{8, netip.Addr{}, []uint32{}, false}}},
}

func names(id uint32) (string, bool) {
	n, ok := map[uint32]string{7: "a", 8: "b"}[id]
	return n, ok
}

func TestPathCodec(t *testing.T) {
	var b []byte
	for _, u := range sample {
		b = appendUpdate(b, u)
	}
	d := pathDecoder{name: names}
	got, err := d.decode(b)
	if err != nil {
		t.Fatal(err)
	}
	want := []bgp.Update{
		{Prefix: prefix("10.1.0.0/16"), Paths: []bgp.Path{
			{Peer: "a", NextHop: addr("169.254.0.11"), ASPath: []uint32{65001, 4200000000}},
			{Peer: "b", NextHop: addr("169.254.0.12"), ASPath: []uint32{}, Kept: true},
		}},
		{Prefix: prefix("0.0.0.0/0")},
		{Prefix: prefix("2001:db8::/32"), Paths: []bgp.Path{{Peer: "a", NextHop: addr("fd00::1"), ASPath: []uint32{65001}}}},
		{Prefix: prefix("10.2.0.0/16"), Paths: []bgp.Path{{Peer: "b", ASPath: []uint32{}}}},
		{Prefix: prefix("::/0"), Paths: []bgp.Path{{Peer: "b", ASPath: []uint32{}}}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	if &got[3].Paths[0] != &got[4].Paths[0] {
		t.Error("equal paths are not shared")
	}
	for name, b := range map[string][]byte{
		"host bits":        appendUpdate(nil, update{netip.PrefixFrom(addr("10.1.0.1"), 16), nil}),
		"too long":         {33, 4, 10, 0, 0, 0, 0},
		"no address":       {0, 0, 0},
		"odd address":      {0, 5, 1, 2, 3, 4, 5, 0},
		"mapped address":   appendUpdate(nil, update{netip.PrefixFrom(addr("::ffff:10.0.0.0"), 128), nil}),
		"unknown peer":     appendUpdate(nil, update{prefix("10.0.0.0/8"), []path{{9, netip.Addr{}, nil, false}}}),
		"truncated":        b[:len(b)-1],
		"AS path too long": appendUpdate(nil, update{prefix("10.0.0.0/8"), []path{{7, netip.Addr{}, make([]uint32, maxASPath+1), false}}}),
		"length lies":      {8, 4, 10, 0, 0, 0, 200, 1},
	} {
		if _, err := d.decode(b); !errors.Is(err, errMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzPathCodec(f *testing.F) {
	for _, u := range sample {
		f.Add(appendUpdate(nil, u))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d := pathDecoder{name: names}
		us, err := d.decode(b)
		if err != nil {
			if !errors.Is(err, errMalformed) {
				t.Fatal(err)
			}
			return
		}
		for _, u := range us {
			if !u.Prefix.IsValid() || u.Prefix != u.Prefix.Masked() || len(u.Paths) > maxPaths {
				t.Fatalf("update %+v", u)
			}
		}
		again, err := d.decode(b)
		if err != nil || !reflect.DeepEqual(us, again) {
			t.Fatalf("decoded twice: %v", err)
		}
	})
}

func TestReadFrame(t *testing.T) {
	var b bytes.Buffer
	if err := writeFrame(&b, frameEnd, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if k, body, err := readFrame(bytes.NewReader(b.Bytes()), 3); k != frameEnd || string(body) != "{}" || err != nil {
		t.Errorf("%v %q %v", k, body, err)
	}
	if _, _, err := readFrame(bytes.NewReader(b.Bytes()), 2); !errors.Is(err, errMalformed) {
		t.Errorf("above the limit: %v", err)
	}
	if _, _, err := readFrame(bytes.NewReader([]byte{0, 0, 0, 0, 1}), 2); !errors.Is(err, errMalformed) {
		t.Errorf("empty: %v", err)
	}
}

func TestOutboxCoalesces(t *testing.T) {
	o := newOutbox()
	p, q := prefix("10.0.0.0/8"), prefix("10.1.0.0/16")
	o.putUpdates([]update{{p, []path{{peer: 1}}}, {q, []path{{peer: 1}}}})
	o.putUpdates([]update{{p, []path{{peer: 2}}}})
	o.putEnd(1)
	us, ends := o.takeUpdates()
	if want := []update{{p, []path{{peer: 2}}}, {q, []path{{peer: 1}}}}; !reflect.DeepEqual(us, want) || len(ends) != 1 {
		t.Errorf("%+v %v", us, ends)
	}
	o.putUpdates([]update{{p, nil}})
	if us, ends = o.takeUpdates(); len(us) != 1 || len(us[0].paths) != 0 || len(ends) != 0 {
		t.Errorf("%+v %v", us, ends)
	}
}

// TestOutboxGathers checks that a single path is sent at once, that the following ones are sent
// together, and that other messages do not wait for paths.
func TestOutboxGathers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutbox()
		r, w := io.Pipe()
		go o.run(w)
		start := time.Now()
		expect := func(after time.Duration, want frameType, updates int) {
			t.Helper()
			got, body, err := readFrame(r, maxFromChild)
			if err != nil || got != want || time.Since(start) != after {
				t.Fatalf("frame %d after %v, %v; want %d after %v", got, time.Since(start), err, want, after)
			}
			if us, err := (&pathDecoder{name: names}).decode(body); want == framePaths && (err != nil || len(us) != updates) {
				t.Errorf("%d updates, %v; want %d", len(us), err, updates)
			}
		}
		o.putUpdates(sample[:1])
		expect(0, framePaths, 1)
		for i := range sample {
			o.putUpdates(sample[i : i+1])
			synctest.Wait()
		}
		o.put(frameState, stateMessage{Peer: 7})
		expect(0, frameState, 0)
		expect(gather, framePaths, len(sample))
		time.Sleep(gather)
		o.putUpdates(sample[:1])
		expect(2*gather, framePaths, 1)
		r.Close()
		o.put(frameState, stateMessage{Peer: 7})
	})
}

// TestCompileRules compares bgp.Rule with a prefix set as GoBGP evaluates it: by the longest entry
// that contains the prefix.
func TestCompileRules(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	random := func() netip.Prefix {
		a := netip.AddrFrom4([4]byte{10, byte(rnd.IntN(2) * 128), byte(rnd.IntN(2) * 128), 0})
		return netip.PrefixFrom(a, rnd.IntN(25)).Masked()
	}
	matched := 0
	for range 20000 {
		var rules []bgp.Rule
		for range 1 + rnd.IntN(4) {
			p := random()
			lo := p.Bits() + rnd.IntN(33-p.Bits())
			rules = append(rules, bgp.Rule{Prefix: p, Min: uint8(rnd.IntN(lo + 1)), Max: uint8(lo + rnd.IntN(33-lo))})
		}
		set := compileRules(rules, true)
		p := random()
		longest := -1
		for _, e := range set {
			if q := prefix(e.IpPrefix); q.Bits() <= p.Bits() && q.Contains(p.Addr()) {
				longest = max(longest, q.Bits())
			}
		}
		got := false
		for _, e := range set {
			q := prefix(e.IpPrefix)
			got = got || q.Bits() == longest && q.Contains(p.Addr()) && int(e.MaskLengthMin) <= p.Bits() && p.Bits() <= int(e.MaskLengthMax)
		}
		if want := bgp.Matches(rules, p); got != want {
			t.Fatalf("%v: rules %v give %v, set %v gives %v", p, rules, want, set, got)
		}
		if got {
			matched++
		}
	}
	if matched < 1000 {
		t.Errorf("only %d matched", matched)
	}
	if set := compileRules([]bgp.Rule{rule("::/0", 0, 128)}, true); set != nil {
		t.Errorf("IPv6 rule as IPv4: %v", set)
	}
}

func TestCheck(t *testing.T) {
	if err := check(nodeASN, loPeer("a", "169.254.0.11", 65001)); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*bgp.Peer){
		"no name":         func(p *bgp.Peer) { p.Name = "" },
		"no address":      func(p *bgp.Peer) { p.Address = netip.Addr{} },
		"mapped":          func(p *bgp.Peer) { p.Address = addr("::ffff:169.254.0.11") },
		"zone":            func(p *bgp.Peer) { p.Address, p.LocalAddress = addr("fe80::1%lo"), addr("fe80::2") },
		"families":        func(p *bgp.Peer) { p.LocalAddress = addr("fd00::1") },
		"same":            func(p *bgp.Peer) { p.LocalAddress = p.Address },
		"multicast":       func(p *bgp.Peer) { p.Address = addr("224.0.0.1") },
		"ASN":             func(p *bgp.Peer) { p.ASN = 0 },
		"hold time 0":     func(p *bgp.Peer) { p.HoldTime = 0 },
		"hold time parts": func(p *bgp.Peer) { p.HoldTime = 3500 * time.Millisecond },
		"keepalive":       func(p *bgp.Peer) { p.Keepalive = 10 * time.Second },
		"restart":         func(p *bgp.Peer) { p.GracefulRestart = 4096 * time.Second },
		"as-override":     func(p *bgp.Peer) { p.ASN, p.ASOverride = nodeASN, true },
		"interface":       func(p *bgp.Peer) { p.Interface = "a-name-that-is-too-long" },
		"rule":            func(p *bgp.Peer) { p.Export.Allow = []bgp.Rule{rule("10.0.0.0/8", 9, 33)} },
		"host bits": func(p *bgp.Peer) {
			p.Import.Allow = []bgp.Rule{{Prefix: netip.PrefixFrom(addr("10.0.0.1"), 8), Max: 8}}
		},
	} {
		p := loPeer("a", "169.254.0.11", 65001)
		change(&p)
		if err := check(nodeASN, p); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestPasswordDoesNotPrint(t *testing.T) {
	c := struct{ MD5 password }{password("hunter2")}
	for _, f := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		if s := fmt.Sprintf(f, c); strings.Contains(s, "hunter2") || strings.Contains(s, "68756e74657232") {
			t.Errorf("%s prints %s", f, s)
		}
	}
}

func TestDecodeCrash(t *testing.T) {
	const stack = `panic: runtime error: slice bounds out of range [5:4]

goroutine 98 [running labels:{"peer": "169.254.0.13"}]:
github.com/osrg/gobgp/v3/pkg/packet/bgp.(*SRv6ServiceTLV).DecodeFromBytes(0x557ab542480)
	prefix_sid.go:662 +0x296
created by github.com/osrg/gobgp/v3/pkg/server.(*fsmHandler).established in goroutine 84
	fsm.go:1835 +0x245

goroutine 99 [running]:
`
	for name, c := range map[string]struct {
		stderr string
		want   crash
	}{
		"named":    {stack, crash{addr("169.254.0.13"), "panic: runtime error: slice bounds out of range [5:4]"}},
		"sending":  {strings.Replace(stack, "bgp.(*SRv6ServiceTLV).DecodeFromBytes", "server.(*fsmHandler).sendMessageloop", 1), crash{reason: "panic: runtime error: slice bounds out of range [5:4]"}},
		"no label": {strings.Replace(stack, ` labels:{"peer": "169.254.0.13"}`, "", 1), crash{reason: "panic: runtime error: slice bounds out of range [5:4]"}},
		"other":    {strings.Replace(stack, `{"peer"`, `{"pear"`, 1), crash{reason: "panic: runtime error: slice bounds out of range [5:4]"}},
		"address":  {strings.Replace(stack, `169.254.0.13`, `169.254.0`, 1), crash{reason: "panic: runtime error: slice bounds out of range [5:4]"}},
		"killed":   {"", crash{reason: "status"}},
		"exit":     {"starting BGP: address in use\n", crash{reason: "status: starting BGP: address in use"}},
		"memory":   {"fatal error: runtime: out of memory\n\ngoroutine 5 gp=0x1 m=2 mp=0x3 [running labels:{\"peer\": \"fd00::1\"}]:\nmain()\n", crash{addr("fd00::1"), "fatal error: runtime: out of memory"}},
	} {
		if got := decodeCrash(c.stderr, "status"); got != c.want {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestSupervisor(t *testing.T) {
	all := []string{"a", "b", "c"}
	at := time.Unix(1_000_000, 0)
	admitted := func(s *supervisor) string {
		return strings.Join(slices.DeleteFunc(slices.Clone(all), func(n string) bool { return !s.admit(n) }), "")
	}
	expect := func(t *testing.T, s *supervisor, want string) {
		t.Helper()
		if got := admitted(s); got != want {
			t.Errorf("%v: admitted %q, not %q", at.Sub(time.Unix(1_000_000, 0)), got, want)
		}
	}

	t.Run("named", func(t *testing.T) {
		s, at := newSupervisor(), at
		for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
			if name, delay := s.crashed(at, "b", "x", nil); name != "b" || delay != 0 {
				t.Errorf("%s, %v", name, delay)
			}
			expect(t, s, "ac")
			next, _ := s.tick(at, all)
			if got := next.Sub(at); got != want*time.Minute {
				t.Errorf("time %d: out for %v", i, got)
			}
			at = next
			if _, changed := s.tick(at, all); !changed {
				t.Error("the end of a hold changes nothing")
			}
			expect(t, s, "abc")
		}
		at = at.Add(2 * holding.Last)
		s.crashed(at, "b", "x", nil)
		if next, _ := s.tick(at, all); next.Sub(at) != time.Minute {
			t.Errorf("long after: out for %v", next.Sub(at))
		}
		if !s.reset("b") || s.reset("b") || s.reset("a") {
			t.Error("reset")
		}
		expect(t, s, "abc")
	})

	just := func(names ...string) map[string]bool {
		m := map[string]bool{}
		for _, n := range names {
			m[n] = true
		}
		return m
	}
	// unnamed makes a crash that names no peer and blames none.
	unnamed := func(t *testing.T, s *supervisor, recent ...string) {
		t.Helper()
		if name, _ := s.crashed(at, "", "x", just(recent...)); name != "" {
			t.Errorf("%s is blamed", name)
		}
	}

	// c sends the message that ends the process when a comes up. Both c and a are suspects, and
	// neither is blamed.
	t.Run("framed", func(t *testing.T) {
		s := newSupervisor()
		at := at
		for range 5 {
			at = at.Add(10 * time.Second)
			s.established(at, "a")
			if name, _ := s.crashed(at, "", "x", just("a")); name != "" {
				t.Fatalf("%s, which merely came up, is blamed", name)
			}
		}
	})

	t.Run("no evidence", func(t *testing.T) {
		s := newSupervisor()
		for range 5 {
			unnamed(t, s)
			s.tick(at, all)
			expect(t, s, "abc")
		}
	})

	t.Run("record", func(t *testing.T) {
		s, at := newSupervisor(), at
		for i := range recordAfter {
			s.established(at, "b")
			at = at.Add(steadyAfter)
			name, _ := s.crashed(at, "", "x", just("b"))
			if want := []string{"", "", "b"}[i]; name != want {
				t.Errorf("crash %d blames %q", i, name)
			}
		}
		if h := s.held("b"); h == nil || !strings.Contains(h.reason, "this peer alone") {
			t.Errorf("%+v", h)
		}
	})

	// Other peers that send at the same time spoil the record. b is tried last, and then alone.
	t.Run("tried", func(t *testing.T) {
		s, at := newSupervisor(), at
		for range 2 {
			if name, _ := s.crashed(at, "", "x", just("a", "b")); name != "" {
				t.Errorf("%s is blamed", name)
			}
		}
		s.crashed(at, "", "x", just("b"))
		expect(t, s, "c")
		s.tick(at, all)
		expect(t, s, "ac") // the less suspect one first
		s.established(at, "a")
		at = at.Add(trialUp - time.Second)
		s.tick(at, all)
		expect(t, s, "ac")
		at = at.Add(time.Second)
		s.tick(at, all)
		expect(t, s, "abc")
		s.established(at, "b")
		at = at.Add(4 * time.Second)
		if name, _ := s.crashed(at, "", "x", just("b")); name != "" {
			t.Errorf("%s is blamed although others were admitted", name)
		}
		expect(t, s, "b") // alone
		s.tick(at, all)
		s.established(at, "b")
		at = at.Add(4 * time.Second)
		if name, _ := s.crashed(at, "", "x", just("b")); name != "b" {
			t.Errorf("%q is blamed", name)
		}
		s.tick(at, all)
		expect(t, s, "ac")
	})

	// A suspect that behaves while it is alone is admitted with the others, and does not hold them
	// out again.
	t.Run("cleared", func(t *testing.T) {
		s, at := newSupervisor(), at
		for range 2 {
			s.crashed(at, "", "x", just("b", "c"))
		}
		s.tick(at, all)
		expect(t, s, "ab")
		s.crashed(at, "", "x", just("b"))
		expect(t, s, "b")
		at = at.Add(trialWait)
		next, changed := s.tick(at, all)
		if !changed || next.IsZero() {
			t.Errorf("%v %v", next, changed)
		}
		expect(t, s, "abc")
		s.crashed(at, "", "x", just("b"))
		expect(t, s, "a")
		s.tick(at, all)
		expect(t, s, "ac")
		for range 20 {
			if next, _ := s.tick(at, all); next.IsZero() {
				break
			} else {
				at = next
			}
		}
		if s.careful {
			t.Error("still careful")
		}
		expect(t, s, "abc")
	})

	t.Run("back-off", func(t *testing.T) {
		s, at := newSupervisor(), at
		var got []time.Duration
		for range 9 {
			_, d := s.crashed(at, "", "x", nil)
			got = append(got, d/time.Second)
		}
		if want := []time.Duration{0, 1, 2, 4, 8, 16, 30, 30, 30}; !slices.Equal(got, want) {
			t.Errorf("%v", got)
		}
		if _, d := s.crashed(at.Add(2*carefulWindow), "", "x", nil); d != 0 {
			t.Errorf("after a quiet time: %v", d)
		}
	})

	t.Run("removed", func(t *testing.T) {
		s := newSupervisor()
		s.crashed(at, "b", "x", nil)
		s.keep([]string{"a"})
		expect(t, s, "abc")
	})
}

func TestRIB(t *testing.T) {
	a, b := loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002)
	r := newRIB()
	r.configure(config(a, b))
	p := func(peer string, as ...uint32) bgp.Path { return bgp.Path{Peer: peer, ASPath: as} }
	expect := func(step string, usedA, usedB, toldA, toldB uint32) {
		t.Helper()
		if r.used["a"] != usedA || r.used["b"] != usedB || r.announced["a"] != toldA || r.announced["b"] != toldB {
			t.Errorf("%s: used %v, announced %v", step, r.used, r.announced)
		}
		again := newRIB()
		again.paths = r.paths
		again.configure(bgp.Config{ASN: r.asn, Peers: r.peers, Announce: config().Announce})
		for _, n := range []string{"a", "b"} {
			if again.used[n] != r.used[n] || again.announced[n] != r.announced[n] {
				t.Errorf("%s: counted again: used %v, announced %v", step, again.used, again.announced)
			}
		}
	}
	expect("ours", 0, 0, 1, 1)
	r.update(bgp.Update{Prefix: prefix("10.1.0.0/16"), Paths: []bgp.Path{p("a", 65001), p("b", 65002)}})
	expect("two paths", 1, 1, 1, 2)
	r.update(bgp.Update{Prefix: prefix("10.1.0.0/16"), Paths: []bgp.Path{p("b", 65002, 65001)}})
	expect("one path with a's ASN in it", 0, 1, 1, 1)
	r.update(bgp.Update{Prefix: prefix("10.1.0.0/16")})
	expect("none", 0, 0, 1, 1)
	if u := r.update(bgp.Update{Prefix: prefix("11.0.0.0/8"), Paths: []bgp.Path{p("a", 65001)}}); len(u.Paths) != 0 {
		t.Errorf("a path that no rule allows got in: %+v", u)
	}
	if u := r.update(bgp.Update{Prefix: prefix("10.3.0.0/16"), Paths: []bgp.Path{p("x", 1), p("a", 65001)}}); len(u.Paths) != 1 {
		t.Errorf("a path of an unknown peer got in: %+v", u)
	}
	expect("filtered", 1, 0, 1, 2)
}
