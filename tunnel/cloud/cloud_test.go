package cloud

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

// TestPresetsKeepTheirOwnRules: what a preset asks for is what its gateway takes, and every value
// says why and from where.
func TestPresetsKeepTheirOwnRules(t *testing.T) {
	if !slices.IsSorted(Names()) {
		t.Errorf("names are not sorted: %v", Names())
	}
	for _, p := range Presets() {
		for _, s := range p.IKEProposals.Is {
			if rule, remedy := p.IKE.Is.Refuse(s, false); rule != "" {
				t.Errorf("%s: %s: %s; %s", p.Name, s, rule, remedy)
			}
		}
		for _, s := range p.ESPProposals.Is {
			if rule, remedy := p.ESP.Is.Refuse(s, true); rule != "" {
				t.Errorf("%s: %s: %s; %s", p.Name, s, rule, remedy)
			}
		}
		if p.IKERekey.Is >= p.IKELifetime.Is || p.ChildRekey.Is >= p.ChildLifetime.Is {
			t.Errorf("%s: the gateway renews first", p.Name)
		}
		if p.FixedHoldTime.Why != "" && p.HoldTime.Is != p.FixedHoldTime.Is || p.Keepalive.Is*3 != p.HoldTime.Is {
			t.Errorf("%s: hold time %v, keepalive %v", p.Name, p.HoldTime.Is, p.Keepalive.Is)
		}
		if p.MaxMTU.Why != "" && p.MTU.Is > p.MaxMTU.Is || int(p.MSS.Is) > p.MTU.Is-40 {
			t.Errorf("%s: MTU %d, MSS %d", p.Name, p.MTU.Is, p.MSS.Is)
		}
		if p.Passive.Is && p.NeverOpensBGP.Is {
			t.Errorf("%s: neither side opens the session", p.Name)
		}
		if p.RouterASN.Is.Has(64620) {
			t.Errorf("%s refuses the number of every example", p.Name)
		}
		v := reflect.ValueOf(p)
		for i := range v.NumField() {
			f := v.Field(i)
			if f.Kind() != reflect.Struct {
				continue
			}
			why, source := f.FieldByName("Why").String(), f.FieldByName("Source").String()
			if (why == "") != (source == "") || why == "" && !f.IsZero() {
				t.Errorf("%s: %s has no reason or no source", p.Name, v.Type().Field(i).Name)
			}
		}
		if len(p.Advice) == 0 {
			t.Errorf("%s: no advice", p.Name)
		}
		rule := p.Inside.Is
		free, err := new(apipa.Account).Free(rule)
		if err != nil {
			t.Fatal(err)
		}
		local, remote := free, free.Addr().Next()
		if !rule.Single {
			local = netip.PrefixFrom(remote.Next(), 30)
		}
		if bad, _ := rule.Check(local, remote); bad != "" {
			t.Errorf("%s refuses what it allocates: %s", p.Name, bad)
		}
	}
}

// TestSettingsAreComplete: a field that is added to Preset shows.
func TestSettingsAreComplete(t *testing.T) {
	var p Preset
	v := reflect.ValueOf(&p).Elem()
	want := 0
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.Struct {
			f.FieldByName("Why").SetString("why " + v.Type().Field(i).Name)
			want++
		}
	}
	p.Advice = []Value[string]{{"a", "b", "c"}}
	got := p.Settings()
	if len(got) != want+1 {
		t.Errorf("%d of %d fields are shown", len(got)-1, want)
	}
	for _, s := range got {
		if s.Name == "" || s.Kind == "" || s.Why == "" {
			t.Errorf("got %+v", s)
		}
	}
}

func TestRefuse(t *testing.T) {
	for _, test := range []struct {
		cloud, proposal string
		esp             bool
		want            string
	}{
		{"aws", "aes256gcm16-prfsha384-ecp384", false, ""},
		{"aws", "aes256gcm128-sha384-ecp384", false, ""},
		{"aws", "aes128-sha1-modp1024", false, ""},
		{"aws", "aes-sha-modp1024", false, ""},
		{"aws", "aes192-sha256-modp2048", false, "takes no cipher aes192"},
		{"aws", "aes192-aes256-sha256-modp2048", false, ""},
		{"aws", "aes256-sha256-modp1536", false, "takes no group modp1536"},
		{"aws", "aes256-sha256-modp1536", true, ""},
		{"aws", "aes256gcm16", true, "renews a CHILD SA only with"},
		{"aws", "aes256-md5-modp2048", true, "takes no integrity algorithm md5"},
		{"aws", "aes256gcm16-prfsha384-x25519", false, "takes no group curve25519"},
		{"aws", "aes256gcm16-prfsha384-ecp384-ke1_mlkem768", false, "takes no additional key exchange"},
		{"aws", "aes256gcm16-prfsha384-ecp384-ke1_mlkem768-ke1_none", false, ""},
		{"aws", "aes256gcm16-ecp384-noesn", true, ""},
		{"aws", "aes256gcm8-ecp384", true, "takes no cipher aes256gcm8"},
		{"azure", "aes256gcm16", true, ""},
		{"azure", "aes256gcm16-ecp521", true, "takes no group ecp521"},
		{"azure", "aes256-sha512-modp2048", false, "takes no integrity algorithm sha512"},
		{"azure", "aes256gcm16-prfsha512-ecp384", false, "takes no pseudo-random function sha512"},
		{"gcp", "aes256-sha384-modp2048", true, "takes no integrity algorithm sha384"},
		{"gcp", "aes256gcm16-prfsha256-x25519", false, ""},
		{"gcp", "aes256gcm16", true, "renews"},
		{"gcp", "aes256gcm16-prfsha384-modp6144", false, "takes no group modp6144"},
		{"oci", "aes256gcm16-prfsha384-ecp384", false, "takes no cipher aes256gcm16"},
		{"oci", "aes256gcm16", true, ""},
	} {
		p, ok := Lookup(test.cloud)
		if !ok {
			t.Fatal(test.cloud)
		}
		algorithms := p.IKE.Is
		if test.esp {
			algorithms = p.ESP.Is
		}
		rule, remedy := algorithms.Refuse(test.proposal, test.esp)
		if !strings.HasPrefix(rule, test.want) || (rule == "") != (test.want == "") || (rule == "") != (remedy == "") {
			t.Errorf("%s %s: got %q, %q, want %q", test.cloud, test.proposal, rule, remedy, test.want)
		}
	}
}

func TestASNs(t *testing.T) {
	p, _ := Lookup("azure")
	for n, want := range map[uint32]bool{65515: true, 65516: false, 65521: false, 8075: true, 65551: true, 65552: false, 64496: true} {
		if p.RouterASN.Is.Has(n) != want {
			t.Errorf("%d: refused is not %v", n, want)
		}
	}
	for n := uint32(1); n < 70000; n++ {
		if n != 65515 && p.RouterASN.Is.Has(n) == p.GatewayASN.Is.Has(n) {
			t.Fatalf("%d is both reserved and usable, or neither", n)
		}
	}
}
