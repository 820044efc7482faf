package main

import (
	"log/slog"
	"path/filepath"
	"time"

	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/firstboot"
	"github.com/isthmus-net/isthmus/router/platform"
	"github.com/isthmus-net/isthmus/router/store"
)

// newBoot returns the first boot from user-data. changed is called when the names of the server may
// have changed.
func newBoot(o options, st *store.Store, authority *auth.Authority, audit *auth.Audit, changed func(), log *slog.Logger) *firstboot.Boot {
	if o.console == "" {
		o.console = filepath.Join(o.runtime, "console")
	}
	kind, _ := platform.ParseKind(o.platform) // empty for auto
	return firstboot.New(firstboot.Options{
		Platform: kind, Reader: platform.Options{Metadata: o.metadata, Seed: o.seed}, Sys: "/sys", Runtime: o.runtime, Console: o.console,
		Records: st, Port: port(o.listen), Changed: changed, Refresh: o.refresh, Authority: authority.Fingerprint, Log: log.With("room", "first boot"),
		Issue: func(name string, request []byte, lifetime time.Duration) (string, string, string, error) {
			certificate, _, err := authority.Issue(name, auth.Admin, request, lifetime)
			if err == nil {
				err = authority.WithdrawFirst()
			}
			return certificate, authority.Certificate(), auth.ServerName, err
		},
		Act: func(method, object, digest string, do func() (uint64, error)) error {
			service := map[string]string{"IssueClient": "AccessService", "Apply": "SpecService"}[method]
			return audit.Act(auth.Entry{Who: document.FirstBoot, Role: auth.Admin.String(), Method: "/isthmus.v1." + service + "/" + method, Object: object, Digest: digest}, do)
		},
	})
}
