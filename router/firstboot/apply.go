package firstboot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/platform"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// take reads user-data and uses it, once in the life of a node.
func (b *Boot) take(ctx context.Context, reader platform.Reader) {
	rec := b.record()
	tried := filepath.Join(b.o.Runtime, "first-boot") // not synced: it does not outlive the boot
	if b.damaged != nil || rec.Done {
		return
	}
	if b.node.Generation() > 0 {
		b.finish(func(r *record) { r.Done = true })
		return
	}
	if _, err := os.Lstat(tried); err == nil {
		b.setTrouble(condition.UserDataRefused.Error(time.Now(), "%s", "user-data was refused in this boot; for the reasons, see the console or "+b.o.Console+": change the user-data and boot again, or apply a document"))
		return
	}
	ctx, cancel := context.WithTimeout(ctx, b.o.Deadline)
	defer cancel()
	until := time.Now().Add(b.o.Deadline).UTC().Format(time.TimeOnly)
	last := ""
	waiting := func(err error) {
		if err.Error() != last {
			b.o.Log.Warn("user-data is not available yet; retrying", "err", err)
			last = err.Error()
		}
		b.setTrouble(condition.FirstBootWaiting.Warning(time.Now(), "%v; the first boot is retried until %s", err, until))
	}
	gaveUp := func(err error) {
		b.o.Log.Error("first boot failed; the next start retries it", "err", err)
		b.setTrouble(condition.FirstBootFailed.Error(time.Now(), "%v; the next start retries it; or apply a document", err))
		b.note("first boot failed: " + err.Error())
	}
	var data []byte
	if err := platform.Keep(ctx, func(ctx context.Context) (err error) { data, err = reader.UserData(ctx); return err }, waiting); err != nil {
		if !errors.Is(context.Cause(ctx), context.Canceled) {
			gaveUp(err)
		}
		return
	}
	if what := Foreign(data); what != "" {
		b.o.Log.Info("user-data is not for isthmus and is ignored; its first line must be "+Header, "it is", what)
		if what == "nothing" {
			b.setTrouble(nil)
			b.note("no user-data was given; waiting for a document")
			return
		}
		b.setTrouble(condition.UserDataIgnored.Warning(time.Now(), "%s", "user-data is "+what+" and is ignored: its first line must be `"+Header+"`; or apply a document"))
		b.note("user-data is " + what + " and is ignored: its first line must be " + Header + "; waiting for a document")
		return
	}
	refuse := func(digest string, problems spec.Problems) {
		if err := b.save(func(r *record) { r.Refused = digest }); err != nil {
			b.o.Log.Warn("refused user-data is read again at the next start", "err", err)
		}
		if err := os.WriteFile(tried, nil, 0o600); err != nil {
			b.o.Log.Warn("refused user-data is read again at the next start", "err", err)
		}
		b.o.Log.Error("user-data was refused; nothing of it was used", "problems", len(problems), "they are in", b.o.Console)
		b.setTrouble(condition.UserDataRefused.Error(time.Now(), "user-data was refused, and nothing of it was used: %s; change it and boot again, or apply a document", oneLine(problems)))
		lines := []string{"user-data was refused, and nothing of it was used:"}
		for _, p := range problems {
			lines = append(lines, "  "+p.String())
		}
		b.note(append(lines, "change it and boot again, or apply a document")...)
	}
	u, problems := Parse(data)
	data = nil
	if len(problems) > 0 {
		refuse(u.Digest, problems)
		return
	}
	if u.Digest == rec.Refused {
		const again = "this user-data was refused at an earlier boot and is not used: change it and boot again, or apply a document"
		b.setTrouble(condition.UserDataRefused.Error(time.Now(), "%s", again))
		b.note(again)
		return
	}
	select {
	case <-b.ready:
	case <-ctx.Done():
	case <-time.After(factsWait):
	}
	var refused spec.Problems
	err := platform.Keep(ctx, func(ctx context.Context) error {
		err := b.use(ctx, u)
		if p, ok := errors.AsType[spec.Problems](err); ok {
			refused = p
			return fmt.Errorf("%w: the document is wrong", platform.ErrPermanent)
		}
		return err
	}, func(err error) {
		if refused == nil {
			waiting(err)
		}
	})
	switch {
	case refused != nil:
		refuse(u.Digest, within("document", refused))
	case err != nil && !errors.Is(context.Cause(ctx), context.Canceled):
		gaveUp(err)
	case err == nil:
		b.setTrouble(nil)
		b.show()
	}
}

// within prefixes the paths of problems in a field's text with the field.
func within(field string, problems spec.Problems) (out spec.Problems) {
	for _, p := range problems {
		at := field
		if p.Line > 0 {
			at = fmt.Sprintf("%s line %d", field, p.Line)
		}
		if p.Path != "" {
			at += ": " + p.Path
		}
		p.Path, p.Line = at, 0
		out = append(out, p)
	}
	return out
}

// maxMessage bounds in bytes the problems in a condition; the console has all of them.
const maxMessage = 4096

func oneLine(problems spec.Problems) string {
	var all []string
	for _, p := range problems {
		all = append(all, p.String())
	}
	s := strings.Join(all, "; ")
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + "... (the console has all)"
	}
	return s
}

// auto finds a text that may need the platform's facts.
var auto = regexp.MustCompile(`(?i)address["']?\s*:\s*["']?auto\b`)

// use applies checked user-data. It checks everything before it does anything. When the daemon ends
// in between, the next start continues; it signs a request again only if the certificate was not
// recorded.
func (b *Boot) use(ctx context.Context, u *UserData) error {
	text := u.Document
	if u.URL != "" {
		var err error
		if text, err = fetch(ctx, u.URL, u.SHA256); err != nil {
			return err
		}
	}
	b.mu.Lock()
	known := !b.read.IsZero() || b.rec.Addresses.Known
	b.mu.Unlock()
	if !known && auto.MatchString(text) {
		return errors.New("the document has `auto` for an address, and the platform has not returned the machine's addresses yet")
	}
	if text != "" {
		if err := b.node.CheckFirst(ctx, text); err != nil {
			return err
		}
	}
	rec := b.record()
	shown := rec.Context
	if rec.Digest != u.Digest {
		shown = ""
	}
	if u.Admin != nil && shown == "" {
		err := b.o.Act("IssueClient", u.Admin.Name, "", func() (uint64, error) {
			certificate, authority, server, err := b.o.Issue(u.Admin.Name, u.Admin.Request, u.Admin.Lifetime)
			shown = contextText(b.address(), server, authority, certificate)
			return 0, err
		})
		if err != nil {
			return fmt.Errorf("admin: signing the request: %w", err)
		}
	}
	err := b.save(func(r *record) {
		r.Digest, r.API, r.Hosts, r.Shell, r.Quiet, r.Context = u.Digest, u.API, u.Hosts, u.Shell, u.Quiet, shown
		if u.Admin != nil {
			r.Admin = u.Admin.Name
		}
		r.Time, r.Done = time.Now().UTC().Truncate(time.Second), text == ""
	})
	if err != nil {
		return err
	}
	b.o.Changed()
	if err := b.node.SetFirstAccess(ctx, u.API); err != nil {
		return fmt.Errorf("access.api: %w", err)
	}
	if text == "" {
		return nil
	}
	var generation uint64
	err = b.o.Act("Apply", "", Digest([]byte(text)), func() (_ uint64, err error) {
		generation, err = b.node.ApplyFirst(ctx, text)
		return generation, err
	})
	if errors.Is(err, store.ErrStale) {
		b.o.Log.Warn("the document of the user-data is not used, since another one was applied meanwhile")
		err, generation = nil, 0
	}
	if err != nil {
		return err
	}
	b.finish(func(r *record) { r.Done, r.Generation = true, generation })
	return nil
}

// finish records that user-data is not read again. When that fails, the next start finds the
// accepted document instead.
func (b *Boot) finish(change func(*record)) {
	if err := b.save(change); err != nil {
		b.o.Log.Warn("storing that the first boot is done failed", "err", err)
		b.mu.Lock()
		change(&b.rec)
		b.mu.Unlock()
	}
}
