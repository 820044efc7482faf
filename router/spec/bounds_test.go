package spec

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/root"
)

const head = "node: {name: n, asn: 64620}\nunderlay: {interface: wan, address: 192.0.2.1}\n"

// times returns n items of a list in flow style.
func times(n int, item func(i int) string) string {
	items := make([]string, n)
	for i := range items {
		items[i] = item(i)
	}
	return "[" + strings.Join(items, ", ") + "]"
}

func prefixes(n, first int) string {
	return times(n, func(i int) string { return fmt.Sprintf("%d.%d.%d.0/24", first+i>>16, i>>8&255, i&255) })
}

func six(n int) string {
	return times(n, func(i int) string { return fmt.Sprintf("'2001:db8:%x:%x::/64'", i>>8, i&255) })
}

func tunnelsOf(n int) string {
	return "tunnels: " + times(n, func(i int) string {
		return fmt.Sprintf("{name: t%d, ipsec: {remoteAddress: 198.18.%d.%d, psk: aws-0}, inside: [{local: 169.254.%d.%d/30}]}", i, i>>8, i&255, i>>6&127, i&63*4+1)
	}) + "\n"
}

const pool = "pools: [{name: p, addresses: [{address: 192.0.2.2}]}], "

func policy(rest string) string {
	return "egress: {" + pool + "policies: [{name: a, pool: p, " + rest + "}]}\n"
}

// work decodes and checks a text, and returns the allocated bytes and the counted steps.
func work(text string) (allocated uint64, steps int, problems Problems) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	d, problems := Decode([]byte(text))
	c := newChecker(d, stored)
	c.document(d)
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc, c.steps, Join(problems, c.Problems())
}

// TestCostGrowsWithLength checks for each list that a text four times as long costs about four
// times the work.
func TestCostGrowsWithLength(t *testing.T) {
	for name, make := range map[string]func(n int) string{
		"tunnels": func(n int) string { return head + tunnelsOf(n) },
		"zones":   func(n int) string { return head + "egress: {zones: [{name: z, sources: " + prefixes(n, 10) + "}]}" },
		"same zones": func(n int) string {
			return head + "egress: {zones: [{name: z, sources: " + times(n, func(int) string { return "10.0.0.0/8" }) + "}]}"
		},
		"sources": func(n int) string { return head + policy("sources: "+prefixes(n, 10)) },
		"same sources": func(n int) string {
			return head + policy("sources: "+times(n, func(int) string { return "10.0.0.0/8" }))
		},
		"ports": func(n int) string {
			return head + policy("protocol: tcp, sources: [10.0.0.0/8], ports: "+times(n, func(i int) string { return fmt.Sprintf("'%d'", 1+2*i) }))
		},
		"same ports": func(n int) string {
			return head + policy("protocol: tcp, sources: [10.0.0.0/8], ports: "+times(n, func(int) string { return "1-65535" }))
		},
		"families": func(n int) string { return head + policy("sources: "+prefixes(n, 10)+", destinations: "+six(n)) },
		"policies": func(n int) string {
			return head + "egress: {" + pool + "policies: " + times(n, func(i int) string {
				return fmt.Sprintf("{name: p%d, pool: p, sources: [10.%d.%d.0/24]}", i, i>>8, i&255)
			}) + "}\n"
		},
		"ties": func(n int) string {
			return head + "egress: {" + pool + "policies: " + times(n, func(i int) string { return fmt.Sprintf("{name: p%d, pool: p, sources: [10.0.0.0/8]}", i) }) + "}\n"
		},
		"pools": func(n int) string {
			return head + "egress: {pools: " + times(n, func(i int) string {
				return fmt.Sprintf("{name: p%d, addresses: [{address: 192.1.%d.%d}]}", i, i>>8, i&255)
			}) +
				", policies: " + times(n, func(i int) string {
				return fmt.Sprintf("{name: p%d, pool: p%d, sources: [10.%d.%d.0/24]}", i, i, i>>8, i&255)
			}) + "}\n"
		},
		"announce": func(n int) string { return head + "announce: " + prefixes(n, 10) },
		"static routes": func(n int) string {
			return head + "staticRoutes: " + times(n, func(i int) string { return fmt.Sprintf("{prefix: 10.%d.%d.0/24, blackhole: true}", i>>8, i&255) })
		},
		"names": func(n int) string {
			return head + policy("sources: [10.0.0.0/8], names: "+times(n, func(i int) string { return fmt.Sprintf("n%d.example", i) }))
		},
		"unknown": func(n int) string {
			return head + "x: 1\n" + "tunnels: " + times(n, func(i int) string { return fmt.Sprintf("{u%d: 1}", i) })
		},
		"bad": func(n int) string {
			return head + "announce: " + times(n, func(i int) string { return fmt.Sprintf("bad%d", i) })
		},
		"long key": func(n int) string { return head + "tunnels: [{" + strings.Repeat("k", 100*n) + ": 1}]" },
	} {
		small, steps, _ := work(make(500))
		large, more, problems := work(make(2000))
		t.Logf("%-14s %8d KB, then %8d KB; %9d steps, then %9d; %d problems", name, small>>10, large>>10, steps, more, len(problems))
		if large > 6*small+1<<20 || more > 6*steps+1000 {
			t.Errorf("%s: %d bytes and %d steps for 500, %d and %d for 2000", name, small, steps, large, more)
		}
		if len(problems) > MaxProblems+1 {
			t.Errorf("%s: %d problems", name, len(problems))
		}
	}
}

// TestProductsAreRefused checks that a product of lists is refused before it is computed.
func TestProductsAreRefused(t *testing.T) {
	// About a second each.
	costly := []string{"policies by alias", "sources and destinations of no-nat", "maps and import rules", "redirects that may catch their proxy", "aliases"}
	for name, k := range map[string]struct{ text, want string }{
		"a policy": {head + policy("protocol: tcp, sources: "+prefixes(300, 10)+", destinations: "+prefixes(300, 20)+", ports: "+times(399, func(i int) string { return fmt.Sprintf("'%d'", 1+2*i) })),
			"line 3: egress.policies[0]: \"a\" makes 35910000 rules"},
		"policies together": {head + "egress: {" + pool + "policies: " + times(100, func(i int) string {
			return fmt.Sprintf("{name: p%d, pool: p, sources: %s, destinations: %s}", i, strings.ReplaceAll(prefixes(40, 10), "10.0.", fmt.Sprintf("10.%d.", i)), prefixes(40, 20))
		}) + "}\n", "egress.policies[81]: \"p81\" makes 1600 rules, one for each source, destination and range of ports, which are with the others more than 131072"},
		"policies by alias": {head + "egress: {" + pool + "policies: [{name: a, pool: p, sources: &s " + prefixes(2000, 10) + "}, " + strings.TrimPrefix(times(200, func(i int) string {
			return fmt.Sprintf("{name: p%d, pool: p, sources: *s, destinations: *s}", i)
		}), "[") + "}\n", "makes 4000000 rules"},
		"sources and destinations of no-nat": {head + "egress: {policies: [{name: a, action: no-nat, sources: " + six(12000) + ", destinations: " + prefixes(12000, 10) + "}]}", "takes more than"},
		"maps and import rules": {head + tunnelsOf(100) + "peers: " + times(100, func(i int) string {
			return fmt.Sprintf("{name: p%d, tunnel: t%d, asn: 64512, import: {allow: %s}}", i, i, times(600, func(i int) string { return fmt.Sprintf("{prefix: 20.%d.%d.0/24}", i>>8, i&255) }))
		}) + "\negress: {maps: " + times(2400, func(i int) string {
			return fmt.Sprintf("{tunnels: %s, inside: 10.%d.%d.0/24, mapped: 11.%d.%d.0/24}", []string{"&t " + times(100, func(i int) string { return fmt.Sprintf("t%d", i) }), "*t"}[min(i, 1)], i>>8, i&255, i>>8, i&255)
		}) + "}", "takes more than"},
		"redirects that may catch their proxy": {head + "egress: {policies: " + times(12000, func(i int) string {
			return fmt.Sprintf("{name: p%d, action: redirect, protocol: tcp, ports: ['80'], sources: [10.0.0.0/8], destinations: [20.%d.%d.0/24], to: '10.0.0.1:80'}", i, i>>8, i&255)
		}) + "}", "is among the sources, so that the packets"},
		"tunnels":        {head + "tunnels: " + times(20000, func(i int) string { return fmt.Sprintf("{name: t%d}", i) }), "tunnels: \"20000\" are more than 9999"},
		"pool addresses": {head + "egress: {pools: [{name: p, addresses: " + times(5000, func(i int) string { return fmt.Sprintf("{address: 192.1.%d.%d}", i>>8, i&255) }) + "}]}", "more than 4096 addresses"},
		"aliases":        {head + "tunnels: [&l {inside: " + times(2000, func(int) string { return "{local: a}" }) + "}, " + strings.Repeat("*l, ", 5000) + "]", "has more than 1048576 values"},
	} {
		if root.Unit() && slices.Contains(costly, name) {
			continue
		}
		allocated, steps, problems := work(k.text)
		t.Logf("%-36s %8d KB, %9d steps, %d problems", name, allocated>>10, steps, len(problems))
		if !strings.Contains(problems.Error(), k.want) {
			t.Errorf("%s: got %.600v", name, problems)
		}
		if steps > maxSteps || allocated > 1<<30 {
			t.Errorf("%s: %d bytes are allocated, %d steps are made", name, allocated, steps)
		}
	}
}

// TestProblemsAreBounded checks that MaxProblems are listed, the others are counted, and none
// repeats much of the document.
func TestProblemsAreBounded(t *testing.T) {
	_, problems := parse(head + "announce: " + times(4012, func(i int) string { return fmt.Sprintf("x%d", i) }))
	last := problems[len(problems)-1]
	if len(problems) != MaxProblems+1 || last.String() != "and 3,912 more problems; fix the listed ones first" || last.More != 3912 {
		t.Errorf("%d problems, the last is %q", len(problems), last)
	}
	if first := problems[0].Path; first != "announce[0]" {
		t.Errorf("the first is of %s", first)
	}
	long := strings.Repeat("ä", 1<<20)
	for _, text := range []string{"announce: ['" + long + "']", long + ": 1", "tunnels: [{name: '" + long + "'}]", "x" + long} {
		if _, problems := parse(head + text); len(problems) == 0 || len(problems.Error()) > 8<<10 {
			t.Errorf("%.10q: %d problems of %d bytes", text, len(problems), len(problems.Error()))
		}
	}
	joined := Join(Problems{{Rule: "a", Line: 9}, {More: 5}}, slices.Repeat(Problems{{Rule: "b", Line: 1}}, 100))
	if n := len(joined); n != MaxProblems+1 || joined[n-1].More != 6 || joined[0].Rule != "b" {
		t.Errorf("joined are %d, the last counts %d", n, joined[n-1].More)
	}
}

// TestCheckEndsWithItsCaller checks that CheckWithin ends with its context.
func TestCheckEndsWithItsCaller(t *testing.T) {
	d, _ := Decode([]byte(head + policy("sources: "+prefixes(1000, 10))))
	ctx, cancel := context.WithCancel(context.Background())
	if _, problems, err := CheckWithin(ctx, d, stored); err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	cancel()
	if _, _, err := CheckWithin(ctx, d, stored); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	c := newChecker(d, stored)
	c.ctx = ctx
	if c.document(d); len(c.s.Policies) > 0 {
		t.Error("policies were checked after the end of the context")
	}
}

func TestOverlaps(t *testing.T) {
	for _, k := range []struct {
		list, want string
	}{
		{"10.0.0.0/8 11.0.0.0/8", "[]"},
		{"10.0.0.0/8 10.1.0.0/16 10.1.0.0/16 10.2.0.0/16", "[1<0 2<1 2<0 3<0]"},
		{"10.1.0.0/16 10.0.0.0/8 9.0.0.0/8", "[1<0]"},
		{"s10.0.0.1/32 s10.0.0.1/32 10.0.0.1/32 s10.0.0.1/32", "[2<0 3<2]"},
		{"10.0.0.0/30 s10.0.0.1/32 s10.0.0.1/32", "[1<0 2<0]"},
		{"2001:db8::/32 2001:db8:1::/48 0.0.0.0/0 10.0.0.0/8", "[1<0 3<2]"},
	} {
		var list []placed
		for _, text := range strings.Fields(k.list) {
			p, single := strings.CutPrefix(text, "s")
			list = append(list, placed{netip.MustParsePrefix(p), fmt.Sprint(single)})
		}
		got := []string{}
		overlaps(list, func(p placed) bool { return p.path == "true" }, func(i, j int) { got = append(got, fmt.Sprintf("%d<%d", i, j)) })
		want := strings.Fields(strings.Trim(k.want, "[]"))
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", k.list, got, want)
		}
	}
	for _, k := range []struct {
		ports string
		want  []int
	}{{"1-9 10-20 21-30", nil}, {"1-100 5-6 7-8 101-102", []int{1, 2}}, {"5-6 1-100 200-201 150-300", []int{1, 3}}} {
		var ports []nat.PortRange
		for _, text := range strings.Fields(k.ports) {
			var r nat.PortRange
			fmt.Sscanf(text, "%d-%d", &r.First, &r.Last)
			ports = append(ports, r)
		}
		if got := portOverlaps(ports); !slices.Equal(got, k.want) {
			t.Errorf("%s: got %v, want %v", k.ports, got, k.want)
		}
	}
}

// TestEditsAreBounded checks that an edit of single policies counts the rules of all policies, also
// after former edits.
func TestEditsAreBounded(t *testing.T) {
	text := head + "egress:\n  " + strings.TrimSuffix(pool, ", ") + "\n  policies:\n  - {name: a, pool: p, sources: " + prefixes(300, 10) + ", destinations: " + prefixes(300, 20) + "}\n"
	s, problems := parse(text)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	set := func(name string, n int) *Edit {
		e := &Edit{}
		e.Read([]byte("policies: [{name: " + name + ", pool: p, sources: " + prefixes(n, 10) + ", destinations: " + prefixes(300, 30) + "}]"))
		return e
	}
	if _, problems, _ := set("b", 300).Apply(s, text); !strings.Contains(problems.Error(), "policies[0]: \"b\" makes 90000 rules") {
		t.Errorf("got %v", problems)
	}
	for _, e := range []*Edit{set("a", 400), set("b", 30)} {
		out, problems, err := e.Apply(s, text)
		if err != nil || len(problems) > 0 {
			t.Fatal(problems, err)
		}
		again, problems := parse(out.Text)
		if len(problems) > 0 || again.rules != out.rules {
			t.Errorf("%d rules are counted by the edit, %d in the text; %v", out.rules, again.rules, problems)
		}
	}
}
