package auth

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

// seen is the newest certificate that the authority has signed: its own, or that of a client that
// is not revoked.
type seen struct {
	at     time.Time
	serial string // of the client's; empty: it is the authority
}

// wrongness is the direction in which the clock is certainly wrong.
type wrongness int

const (
	notWrong wrongness = iota
	// behind is a clock before an event in the past.
	behind
	// ahead is a clock at which every certificate ever issued has expired, including the longest
	// possible one.
	ahead
)

// reading is the time of the clock with an assessment of it.
type reading struct {
	now   time.Time
	wrong wrongness
	// at is the time for checking the end of a certificate. For a clock that is behind, it is the
	// time of the build if that is later, which is certainly in the past; for one that is ahead,
	// the newest signature.
	at time.Time
	// trust is the time for checking the authorities: now, or the newest signature.
	trust  time.Time
	newest seen
}

// see records the newest signature.
func (a *Authority) see() {
	a.seeing.Lock()
	defer a.seeing.Unlock()
	c := a.present.Load()
	if c == nil {
		return
	}
	s := seen{at: c.cert.NotBefore.Add(backdate)}
	for _, client := range a.Clients() {
		if !client.Revoked && client.Issued.After(s.at) {
			s = seen{client.Issued, client.Serial}
		}
	}
	a.newest.Store(&s)
}

// clock reads the clock.
func (a *Authority) clock() reading {
	now := a.now()
	r := reading{now: now, at: now, trust: now}
	newest := a.newest.Load()
	if newest == nil {
		return r // the authority waits for the clock
	}
	r.newest = *newest
	last := later(newest.at, a.options.Sane)
	switch {
	case now.Before(newest.at.Add(-backdate)), now.Before(a.options.Sane):
		r.wrong, r.at, r.trust = behind, later(now, a.options.Sane), last
	case now.After(last.Add(MaxLifetime)):
		r.wrong, r.at, r.trust = ahead, last, last
	}
	return r
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// why describes how the clock is known to be wrong, and the remedy.
func (r reading) why(sane time.Time) string {
	text := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	switch {
	case r.wrong == ahead:
		return fmt.Sprintf("the clock says %s, which is more than 10 years after the newest certificate that the node has signed, of %s: set the clock; "+
			"if it is right, issue a certificate as root on the node", text(r.now), text(r.newest.at))
	case r.now.Before(sane):
		return fmt.Sprintf("the clock says %s, and isthmusd was built from a revision of %s: set the clock", text(r.now), text(sane))
	case r.newest.serial != "":
		return fmt.Sprintf("the clock says %s, and the node has issued client certificate %s at %s: set the clock; if it is right now and was wrong then, "+
			"isthmus client revoke %s", text(r.now), r.newest.serial, text(r.newest.at), r.newest.serial)
	}
	return fmt.Sprintf("the clock says %s, and the certificate authority was made at %s: set the clock; if it is right now and was wrong then, isthmus authority renew",
		text(r.now), text(r.newest.at))
}

// wrongClock returns an error that wraps ErrInvalid when certificates must not be signed by the
// present clock: their times would be wrong. Root on the node can state that a clock which seems to
// be ahead is right, by issuing a certificate.
func (a *Authority) wrongClock(root bool) error {
	r := a.clock()
	if r.wrong == notWrong || r.wrong == ahead && root {
		return nil
	}
	return fmt.Errorf("%w: no certificate is issued while the clock is wrong: %s", ErrInvalid, r.why(a.options.Sane))
}

// MayIssue returns an error that wraps ErrInvalid if the clock prevents the caller from issuing
// certificates: a clock that is behind prevents everyone; one that seems to be ahead prevents
// everyone except root on the node, who can check it.
func (a *Authority) MayIssue(ctx context.Context) error {
	return a.wrongClock(FromContext(ctx).Serial == "")
}

// MayRenew returns an error that wraps ErrInvalid if the clock prevents the caller from renewing
// the authority: one that seems to be ahead prevents everyone except root on the node. One that is
// behind does not, because renewing is the remedy for an authority that was made under a clock that
// was ahead.
func (a *Authority) MayRenew(ctx context.Context) error {
	if a.clock().wrong != ahead {
		return nil
	}
	return a.MayIssue(ctx)
}

// verifyAnyway checks a client's certificate while the clock is wrong. A certificate of this
// authority was issued in the past, whatever the clock says, so its beginning is not checked. Its
// end is, as far as the node can know. verify checks that it was issued here and is not revoked.
func (a *Authority) verifyAnyway(cert *x509.Certificate, r reading) error {
	c, err := a.authority()
	if err != nil {
		return err
	}
	var errs []error
	for _, ca := range c.trusted(r.trust) {
		roots := x509.NewCertPool()
		roots.AddCert(ca)
		_, err := cert.Verify(x509.VerifyOptions{
			Roots: roots, CurrentTime: later(cert.NotBefore, ca.NotBefore), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		switch {
		case err != nil:
			errs = append(errs, err)
		case r.at.After(ca.NotAfter):
			errs = append(errs, fmt.Errorf("the authority ended at %s", ca.NotAfter.UTC().Format(time.RFC3339)))
		case r.at.After(cert.NotAfter):
			return fmt.Errorf("the certificate ended at %s", cert.NotAfter.UTC().Format(time.RFC3339))
		default:
			return nil
		}
	}
	return errors.Join(errs...)
}

func (a *Authority) clockConditions() []*isthmusv1.Condition {
	r := a.clock()
	if r.wrong == notWrong {
		return nil
	}
	return []*isthmusv1.Condition{condition.ClockWrong.Error(time.Time{}, "%s", r.why(a.options.Sane))}
}
