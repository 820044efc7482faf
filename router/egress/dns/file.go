package dns

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

// encode returns the state that a later run needs.
func (t *table) encode() ([]byte, error) {
	out := map[string]map[netip.Addr]time.Time{}
	for name, r := range t.records {
		out[name] = make(map[netip.Addr]time.Time, len(r.entries))
		for a, e := range r.entries {
			out[name][a] = t.until(e)
		}
	}
	return json.Marshal(out)
}

// decode loads the state of an earlier run. Until a server answers, it stays for the grace time.
func (t *table) decode(data []byte, now time.Time) error {
	var known map[string]map[netip.Addr]time.Time
	if err := json.Unmarshal(data, &known); err != nil {
		return fmt.Errorf("decoding names: %w", err)
	}
	for name, until := range known {
		if n, err := egress.ParseName(name); err != nil || n != name {
			return fmt.Errorf("decoding names: %q is not a valid name", name)
		}
		r := newRecord()
		t.records[name] = r
		for a, at := range until {
			if !egress.IsWildcard(name) && at.Before(now) {
				at = now // it was good when the former run ended
			}
			t.add(name, "", []netip.Addr{a}, at, time.Time{})
		}
		for i := range r.queries {
			r.queries[i] = query{next: now, failing: now}
		}
	}
	return nil
}
