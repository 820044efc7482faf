package event

import (
	"cmp"
	"fmt"
	"path"
	"strings"
	"time"
)

// Call is an entry of the audit log, which has no secrets; see router/auth.
type Call struct {
	Time                         time.Time
	Event                        string // "end", "refused", or another one, which has no event
	Who, Address, Method, Object string
	Result, Error                string
	Suppressed                   uint64
}

// calls are the events of calls that succeeded, by the name of their method. A document that was
// accepted has its event from the history.
var calls = map[string]struct {
	kind   *Kind
	prefix string // of the object; "": the event is of the node
	text   string // with the object of the call
}{
	"Confirm":        {Confirmed, "", "%s was confirmed"},
	"DeleteSecret":   {SecretDeleted, "secret/", "secret %s was deleted"},
	"EndFlows":       {FlowsEnded, "", "flows were ended %s"},
	"IssueClient":    {ClientIssued, "client/", "a certificate was issued for %s"},
	"PowerOff":       {MachineChanged, "", "the machine is switched off%s"},
	"Reboot":         {MachineChanged, "", "the machine reboots%s"},
	"RenewAuthority": {AuthorityRenewed, "", "the certificate authority was renewed %s"},
	"RenewClient":    {ClientRenewed, "client/", "a certificate was renewed: %s"},
	"ResetPeer":      {PeerReset, "peer/", "the session %s was reset"},
	"ResetTunnel":    {TunnelReset, "tunnel/", "the tunnel %s was reset"},
	"RevokeClient":   {ClientRevoked, "client/", "certificate %s was revoked"},
	"RollbackSecret": {SecretSet, "secret/", "the former value of secret %s was restored"},
	"RollbackSlot":   {MachineChanged, "", "the machine starts its other slot%s"},
	"Seal":           {MachineChanged, "", "secrets were sealed: %s"},
	"SetSecret":      {SecretSet, "secret/", "secret %s was set"},
	"Unseal":         {MachineChanged, "", "secrets were unsealed%s"},
	"Upgrade":        {MachineChanged, "", "an image was written: %s"},
}

// Call records the event of a call, if it has one.
func (l *Log) Call(a Call) {
	if e, ok := called(a); ok {
		l.record(e)
	}
}

// called returns the event of a call.
func called(a Call) (Event, bool) {
	e := Event{Time: a.Time, Object: "node", Who: a.Who}
	use := func(k *Kind, format string, args ...any) (Event, bool) {
		e.Type, e.Severity, e.Message = k.Name, k.Severity, fmt.Sprintf(format, args...)
		return e, true
	}
	method := path.Base(a.Method)
	switch {
	case a.Event == "refused" && a.Method == "":
		more := ""
		if a.Suppressed > 0 {
			more = fmt.Sprintf("; %d others before it were not recorded", a.Suppressed)
		}
		return use(LoginRefused, "a connection from %s was refused: %s%s", a.Address, a.Error, more)
	case a.Event == "refused":
		return use(CallRefused, "%s was refused: %s", method, a.Error)
	case a.Event != "end":
		return e, false
	case (method == "Ping" || method == "Capture") && a.Result == "Canceled":
		return e, false // a person who has seen enough ends it
	case a.Result != "OK":
		object := a.Object
		if strings.Contains(object, " ") { // no name, such as "why: NET-1234"
			object = "(" + object + ")"
		}
		return use(CallFailed, "%s failed: %s: %s", strings.TrimSpace(method+" "+object), a.Result, cmp.Or(a.Error, "no reason"))
	}
	c, ok := calls[method]
	if !ok {
		return e, false
	}
	if c.prefix != "" {
		name, _, _ := strings.Cut(a.Object, " ")
		if c.kind == ClientRenewed {
			name = a.Who // the object is always the caller's certificate
		}
		e.Object = c.prefix + name
	}
	if c.kind == Confirmed {
		fmt.Sscanf(a.Object, "generation %d", &e.Generation)
	}
	return use(c.kind, "%s", strings.TrimSpace(fmt.Sprintf(c.text, a.Object)))
}
