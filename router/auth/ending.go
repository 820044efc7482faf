package auth

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/store"
)

const (
	// endingWarning is how long before its end a condition reports a client certificate; a third of
	// its lifetime if that is less.
	endingWarning = 30 * 24 * time.Hour
	// endingError is how long before its end the last certificate of an admin is an error.
	endingError = 7 * 24 * time.Hour
	// maxEnding bounds the certificates that are named.
	maxEnding = 5
)

func endsSoon(c store.Client, now time.Time) bool {
	return !now.Before(c.Expires.Add(-min(endingWarning, c.Expires.Sub(c.Issued)/3)))
}

// The kinds of certificates in Expiries.
const (
	AuthorityExpiry = "authority"
	ServerExpiry    = "server"
	AdminExpiry     = "last-admin"
	ClientExpiry    = "client"
)

// Expiries returns the end of the authority's certificate, of the server's, of the last one of an
// admin, and of the first one of any client that expires. It omits client certificates that were
// renewed, revoked or have expired, and kinds without a certificate.
func (a *Authority) Expiries() map[string]time.Time {
	out := map[string]time.Time{}
	c, err := a.authority()
	if err != nil {
		return out
	}
	out[AuthorityExpiry] = c.cert.NotAfter
	a.mu.Lock()
	if a.server != nil {
		out[ServerExpiry] = a.server.Leaf.NotAfter
	}
	a.mu.Unlock()
	now, all, renewed := a.now(), a.Clients(), map[string]bool{}
	for _, c := range all {
		renewed[c.RenewedFrom] = renewed[c.RenewedFrom] || !c.Revoked
	}
	for _, c := range all {
		if c.Revoked || renewed[c.Serial] || !now.Before(c.Expires) {
			continue
		}
		if c.Role == Admin.String() && c.Expires.After(out[AdminExpiry]) {
			out[AdminExpiry] = c.Expires
		}
		if first, ok := out[ClientExpiry]; !ok || c.Expires.Before(first) {
			out[ClientExpiry] = c.Expires
		}
	}
	return out
}

// endingConditions reports client certificates that expire soon: the last one of an admin, after
// which only root on the node manages it, separately, and the others together. It omits those that
// were renewed, revoked or have expired.
func (a *Authority) endingConditions() []*isthmusv1.Condition {
	now := a.now()
	if a.clock().wrong != notWrong {
		return nil
	}
	var last store.Client
	renewed := map[string]bool{}
	all := slices.DeleteFunc(a.Clients(), func(c store.Client) bool { return c.Revoked })
	for _, c := range all {
		if c.Role == Admin.String() && c.Expires.After(last.Expires) {
			last = c
		}
		renewed[c.RenewedFrom] = true
	}
	slices.SortFunc(all, func(a, b store.Client) int { return cmp.Or(a.Expires.Compare(b.Expires), cmp.Compare(a.Name, b.Name)) })
	var out []*isthmusv1.Condition
	if last.Serial != "" && endsSoon(last, now) {
		out = append(out, lastAdmin(last, now))
	}
	var names []string
	for _, c := range all {
		if c.Serial != last.Serial && !renewed[c.Serial] && now.Before(c.Expires) && endsSoon(c, now) {
			names = append(names, fmt.Sprintf("%s (%s) at %s", c.Name, c.Role, c.Expires.UTC().Format(time.RFC3339)))
		}
	}
	if n := len(names); n > 0 {
		text := strings.Join(names[:min(n, maxEnding)], ", ")
		if n > maxEnding {
			text += fmt.Sprintf(" and %d more (isthmus client list)", n-maxEnding)
		}
		out = append(out, condition.ClientsExpire.Warning(time.Time{}, "%s", "client certificates end soon: "+text+": let each client run isthmus client renew, or issue others (isthmus client issue)"))
	}
	return out
}

func lastAdmin(c store.Client, now time.Time) *isthmusv1.Condition {
	ends, left := c.Expires.UTC().Format(time.RFC3339), c.Expires.Sub(now)
	severity := "warning"
	if left < endingError {
		severity = "error"
	}
	if left <= 0 {
		return condition.ClientExpires.With(condition.Severity(severity), time.Time{}, "the last certificate of an admin, %s of %s, ended at %s: as root on the node, "+
			"issue another one (isthmus client issue), or revoke this one if root alone is to manage the node", c.Serial, c.Name, ends)
	}
	return condition.ClientExpires.With(condition.Severity(severity), time.Time{}, "the last certificate of an admin, %s of %s, ends at %s, and then root on the node alone manages it: "+
		"let %s run isthmus client renew, or issue another one (isthmus client issue)", c.Serial, c.Name, ends, c.Name)
}
