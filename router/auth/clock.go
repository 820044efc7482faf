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

// seen is the newest thing that the authority has signed: itself, or the certificate of a client
// that is not revoked.
type seen struct {
	at     time.Time
	serial string // of the client's; empty: it is the authority
}

// wrongness says in which direction the clock is wrong for certain.
type wrongness int

const (
	notWrong wrongness = iota
	// behind is a clock before something that has happened.
	behind
	// ahead is a clock at which every certificate that was ever issued has ended, and the longest
	// one too that could have been.
	ahead
)

// reading is what the clock says, and what it is worth.
type reading struct {
	now   time.Time
	wrong wrongness
	// at is when the end of a certificate is judged. For a clock that is behind that is the time of
	// the build when that is later, which is over for certain; for one that is ahead the newest
	// thing that was seen.
	at time.Time
	// trust is when the authorities are judged: now, or the newest thing that was seen.
	trust  time.Time
	newest seen
}

// see notes the newest thing that was signed.
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

// why tells how the clock is known to be wrong, and what to do.
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
// present clock: their times would be wrong. Root on the node can say that a clock which seems to
// be ahead is right, by issuing a certificate.
func (a *Authority) wrongClock(root bool) error {
	r := a.clock()
	if r.wrong == notWrong || r.wrong == ahead && root {
		return nil
	}
	return fmt.Errorf("%w: no certificate is issued while the clock is wrong: %s", ErrInvalid, r.why(a.options.Sane))
}

// MayIssue returns an error that wraps ErrInvalid when the clock keeps the caller from issuing
// certificates: one that is behind keeps everyone, and one that seems to be ahead keeps all but
// root on the node, who can see whether it is.
func (a *Authority) MayIssue(ctx context.Context) error {
	return a.wrongClock(FromContext(ctx).Serial == "")
}

// MayRenew returns an error that wraps ErrInvalid when the clock keeps the caller from renewing the
// authority: one that seems to be ahead keeps all but root on the node. One that is behind does
// not, since renewing is the remedy for an authority that was made under a clock that was ahead.
func (a *Authority) MayRenew(ctx context.Context) error {
	if a.clock().wrong != ahead {
		return nil
	}
	return a.MayIssue(ctx)
}

// verifyAnyway checks the certificate that a client shows while the clock is wrong. A certificate
// of this authority was issued in the past, whatever the clock says, so its beginning is not looked
// at. Its end is, as well as the node can know. That it was issued here and is not revoked is for
// verify.
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
