package event

import (
	"slices"
	"strings"
)

// Severity says how much an event matters.
type Severity string

// The severities, the least first.
const (
	Info    Severity = "info"
	Warning Severity = "warning"
	Error   Severity = "error"
)

// Severities lists the severities, the least first.
var Severities = []Severity{Info, Warning, Error}

// Kind is a kind of event. Its meaning is a complete sentence.
type Kind struct {
	Name string
	// Of is the kind of object that has the event, as in its object: "tunnel", "peer", "pool",
	// "secret", "client" or "node". An event about a condition has the object of the condition.
	Of       string
	Severity Severity // Of an event about a condition it is that of the condition.
	Meaning  string
	// Admin says that only admins see the events: they are about access, like the list of clients.
	Admin bool
}

// The kinds of events.
var (
	Applied          = &Kind{Name: "Applied", Of: "node", Severity: Info, Meaning: "The node has carried out a generation as a whole."}
	AuthorityRenewed = &Kind{Name: "AuthorityRenewed", Of: "node", Severity: Warning, Admin: true, Meaning: "An admin has made a new certificate authority."}
	CallFailed       = &Kind{Name: "CallFailed", Of: "node", Severity: Warning, Admin: true, Meaning: "A call that would have changed something failed, such as the apply of a document with problems. Nothing has changed."}
	CallRefused      = &Kind{Name: "CallRefused", Of: "node", Severity: Warning, Admin: true, Meaning: "The node refused a call: the role of the caller is too low, or its certificate is revoked."}
	ClientIssued     = &Kind{Name: "ClientIssued", Of: "client", Severity: Info, Admin: true, Meaning: "The node has signed a client certificate."}
	ClientRenewed    = &Kind{Name: "ClientRenewed", Of: "client", Severity: Info, Admin: true, Meaning: "A client has renewed its certificate."}
	ClientRevoked    = &Kind{Name: "ClientRevoked", Of: "client", Severity: Warning, Admin: true, Meaning: "An admin has revoked a client certificate."}
	ConditionBegan   = &Kind{Name: "ConditionBegan", Of: "node", Severity: Warning, Meaning: "A condition has begun: a limit, a guard, a takeover, a withdrawal or a refusal. The message begins with its type."}
	ConditionChanged = &Kind{Name: "ConditionChanged", Of: "node", Severity: Warning, Meaning: "A condition has changed its severity."}
	ConditionEnded   = &Kind{Name: "ConditionEnded", Of: "node", Severity: Info, Meaning: "A condition has ended."}
	Confirmed        = &Kind{Name: "Confirmed", Of: "node", Severity: Info, Meaning: "An operator has confirmed a generation. The node keeps it."}
	DocumentAccepted = &Kind{Name: "DocumentAccepted", Of: "node", Severity: Info, Meaning: "The node has accepted a document, and is about to carry it out."}
	FlowsEnded       = &Kind{Name: "FlowsEnded", Of: "node", Severity: Info, Meaning: "An operator has ended flows through the node."}
	LoginRefused     = &Kind{Name: "LoginRefused", Of: "node", Severity: Warning, Admin: true, Meaning: "The node refused a connection: it has no certificate of this node, or one that is expired or revoked."}
	MachineChanged   = &Kind{Name: "MachineChanged", Of: "node", Severity: Warning, Meaning: "An admin has upgraded, rebooted, switched off, sealed or unsealed the machine, or has chosen its other slot."}
	NodeStarted      = &Kind{Name: "NodeStarted", Of: "node", Severity: Info, Meaning: "The daemon has started. The message says whether the run before ended without a stop."}
	NodeStopped      = &Kind{Name: "NodeStopped", Of: "node", Severity: Info, Meaning: "The daemon was stopped. The kernel keeps tunnels, routes and rules."}
	TunnelReset      = &Kind{Name: "TunnelReset", Of: "tunnel", Severity: Info, Meaning: "An operator has reset a tunnel: its keys are negotiated again."}
	PeerReset        = &Kind{Name: "PeerReset", Of: "peer", Severity: Info, Meaning: "An operator has reset a BGP session."}
	PoolAddressDown  = &Kind{Name: "PoolAddressDown", Of: "pool", Severity: Warning, Meaning: "An address of a pool has failed its health checks. New flows do not get it while others are healthy."}
	PoolAddressUp    = &Kind{Name: "PoolAddressUp", Of: "pool", Severity: Info, Meaning: "An address of a pool passes its health checks again, or is no longer probed or no longer in the pool."}
	Reverted         = &Kind{Name: "Reverted", Of: "node", Severity: Warning, Meaning: "A document was not confirmed in time, and the node has gone back to the former one."}
	SecretDeleted    = &Kind{Name: "SecretDeleted", Of: "secret", Severity: Info, Meaning: "An operator has deleted a secret."}
	SecretSet        = &Kind{Name: "SecretSet", Of: "secret", Severity: Info, Meaning: "An operator has set a secret, or has restored its former value."}
	SessionDown      = &Kind{Name: "SessionDown", Of: "peer", Severity: Error, Meaning: "A BGP session is no longer established, or did not come up."}
	SessionRemoved   = &Kind{Name: "SessionRemoved", Of: "peer", Severity: Info, Meaning: "A BGP session is no longer in the document."}
	SessionUp        = &Kind{Name: "SessionUp", Of: "peer", Severity: Info, Meaning: "A BGP session is established."}
	Suppressed       = &Kind{Name: "Suppressed", Of: "node", Severity: Warning, Meaning: "Events were so many that some were not recorded. The message has their number."}
	TunnelDown       = &Kind{Name: "TunnelDown", Of: "tunnel", Severity: Error, Meaning: "A tunnel is down, or did not come up. The message has the reason."}
	TunnelRemoved    = &Kind{Name: "TunnelRemoved", Of: "tunnel", Severity: Info, Meaning: "A tunnel is no longer in the document."}
	TunnelSuspect    = &Kind{Name: "TunnelSuspect", Of: "tunnel", Severity: Error, Meaning: "The keys of a tunnel are negotiated, but data does not pass in both directions. Routes do not use the tunnel."}
	TunnelUp         = &Kind{Name: "TunnelUp", Of: "tunnel", Severity: Info, Meaning: "A tunnel is up."}
)

// All are the kinds, by name.
var All = []*Kind{
	Applied, AuthorityRenewed, CallFailed, CallRefused, ClientIssued, ClientRenewed, ClientRevoked, ConditionBegan, ConditionChanged,
	ConditionEnded, Confirmed, DocumentAccepted, FlowsEnded, LoginRefused, MachineChanged, NodeStarted, NodeStopped, PeerReset,
	PoolAddressDown, PoolAddressUp, Reverted, SecretDeleted, SecretSet, SessionDown, SessionRemoved, SessionUp, Suppressed, TunnelDown,
	TunnelRemoved, TunnelReset, TunnelSuspect, TunnelUp,
}

// Lookup returns the kind with a name, ignoring case, and false if the name is unknown.
func Lookup(name string) (*Kind, bool) {
	i := slices.IndexFunc(All, func(k *Kind) bool { return strings.EqualFold(k.Name, name) })
	if i < 0 {
		return nil, false
	}
	return All[i], true
}
