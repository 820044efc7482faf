package spec

import (
	"errors"
	"strings"
	"testing"
)

// TestDisabling edits texts in the styles that people write.
func TestDisabling(t *testing.T) {
	both := Disabling{Tunnels: []string{"b"}, Peers: []string{"b"}, Disabled: true}
	for what, c := range map[string]struct {
		edit     Disabling
		was, now string
		back     string // after the opposite edit; empty: was
	}{
		"block": {both,
			"tunnels:\n  # first\n  - name: a # one\n    mtu: 1400\n  - mtu: 1400\n    name: \"b\" # other\n    probe: false\npeers:\n- name: b\n  asn: 1\n",
			"tunnels:\n  # first\n  - name: a # one\n    mtu: 1400\n  - mtu: 1400\n    name: \"b\" # other\n    disabled: true\n    probe: false\npeers:\n- name: b\n  disabled: true\n  asn: 1\n", ""},
		"flow": {both,
			"tunnels:\n- {name: a, mtu: 1400}\n- {mtu: 1400, name: 'b', probe: false} # ä\npeers: [{name: b, asn: 1}]\n",
			"tunnels:\n- {name: a, mtu: 1400}\n- {mtu: 1400, name: 'b', disabled: true, probe: false} # ä\npeers: [{name: b, disabled: true, asn: 1}]\n", ""},
		"JSON": {both,
			`{"tunnels": [{"name": "b"}], "peers": [{"name": "b", "asn": 1}]}`,
			`{"tunnels": [{"name": "b", "disabled": true}], "peers": [{"name": "b", "disabled": true, "asn": 1}]}`, ""},
		"no line feed at the end": {Disabling{Tunnels: []string{"b"}, Disabled: true}, "tunnels:\n- name: b", "tunnels:\n- name: b\n  disabled: true\n", "tunnels:\n- name: b\n"},
		"a field that is there": {both,
			"tunnels:\n- name: b\n  disabled: false # why\npeers:\n- disabled: false\n  name: b\n",
			"tunnels:\n- name: b\n  disabled: true # why\npeers:\n- disabled: true\n  name: b\n",
			"tunnels:\n- name: b\n  disabled: false # why\npeers:\n- disabled: false\n  name: b\n"},
		"twice the same name": {Disabling{Tunnels: []string{"b", "b"}, Disabled: true}, "tunnels:\n- name: b\n", "tunnels:\n- name: b\n  disabled: true\n", ""},
		"aliases": {both,
			"tunnels:\n- {name: &n b}\npeers:\n- name: *n\n  asn: 1 # one\n",
			"tunnels:\n  - {name: &n b, disabled: true}\npeers:\n  - name: *n\n    asn: 1 # one\n    disabled: true\n",
			"tunnels:\n  - {name: &n b}\npeers:\n  - name: *n\n    asn: 1 # one\n"},
		"already": {both, "tunnels:\n- name: b\n  disabled: true\npeers:\n- name: b\n  disabled: true\n", "tunnels:\n- name: b\n  disabled: true\npeers:\n- name: b\n  disabled: true\n", "tunnels:\n- name: b\npeers:\n- name: b\n"},
	} {
		got, problems, err := c.edit.Apply(c.was)
		if err != nil || len(problems) > 0 || got != c.now {
			t.Errorf("%s: %v, %v\n%s\nwant\n%s", what, problems, err, got, c.now)
			continue
		}
		c.edit.Disabled = false
		if c.back == "" {
			c.back = c.was
		}
		if got, problems, err := c.edit.Apply(got); err != nil || len(problems) > 0 || got != c.back {
			t.Errorf("%s, and back: %v, %v\n%s\nwant\n%s", what, problems, err, got, c.back)
		}
	}
}

// TestDisablingRefused edits nothing when one name is unknown, or when an edit would change another
// object.
func TestDisablingRefused(t *testing.T) {
	_, problems, err := Disabling{Tunnels: []string{"a", "x"}, Peers: []string{"y"}, Disabled: true}.Apply("tunnels: [{name: a}]\n")
	if err != nil || len(problems) != 2 || problems[0].Path != "tunnels[1]" || problems[1].Path != "peers[0]" || !strings.Contains(problems[1].Remedy, "isthmus get peers") {
		t.Errorf("unknown names: %v, %v", problems, err)
	}
	const shared = "tunnels: &all [{name: a}]\npeers: *all\n"
	if out, problems, err := (Disabling{Tunnels: []string{"a"}, Disabled: true}).Apply(shared); !errors.Is(err, errEdit) {
		t.Errorf("shared text: %q, %v, %v", out, problems, err)
	}
}

func TestDisablingWords(t *testing.T) {
	for want, e := range map[string]Disabling{
		"disable tunnel a, peer b":                       {Tunnels: []string{"a"}, Peers: []string{"b"}, Disabled: true},
		"enable tunnel a, tunnel b, tunnel c and 1 more": {Tunnels: []string{"a", "b", "c", "d"}},
	} {
		if e.String() != want {
			t.Errorf("%q, want %q", e, want)
		}
	}
}
