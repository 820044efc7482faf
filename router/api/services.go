package api

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/logs"
	"github.com/isthmus-net/isthmus/router/reason"
	"github.com/isthmus-net/isthmus/router/store"
)

// maxDocument bounds a document, as text or as a message, in bytes.
const maxDocument = 16 << 20

// services implements the calls of every service, except those that read nouns, over one Router.
type services struct {
	router    Router
	machine   Machine // nil: none
	authority *auth.Authority
	events    *event.Log
	logs      *logs.Log
	stopping  chan struct{} // closed when the server stops

	reading, writing, listing *gate
	applying, watchingLogs    *gate // these only count: their calls take no turn
	// These have a value for each call that is under way.
	pinging, capturing chan struct{}

	isthmusv1.UnimplementedSpecServiceServer
	isthmusv1.UnimplementedTunnelServiceServer
	isthmusv1.UnimplementedBGPServiceServer
	isthmusv1.UnimplementedRouteServiceServer
	isthmusv1.UnimplementedNATServiceServer
	isthmusv1.UnimplementedSystemServiceServer
	isthmusv1.UnimplementedSecretServiceServer
	isthmusv1.UnimplementedAccessServiceServer
	isthmusv1.UnimplementedEventServiceServer
	isthmusv1.UnimplementedLogServiceServer
	isthmusv1.UnimplementedDiagnosticServiceServer
}

func (s *services) register(server *grpc.Server) {
	r := s.serveNouns(server)
	isthmusv1.RegisterSpecServiceServer(r, s)
	isthmusv1.RegisterTunnelServiceServer(r, s)
	isthmusv1.RegisterBGPServiceServer(r, s)
	isthmusv1.RegisterRouteServiceServer(r, s)
	isthmusv1.RegisterNATServiceServer(r, s)
	isthmusv1.RegisterSystemServiceServer(r, s)
	isthmusv1.RegisterSecretServiceServer(r, s)
	isthmusv1.RegisterAccessServiceServer(r, s)
	isthmusv1.RegisterEventServiceServer(r, s)
	isthmusv1.RegisterLogServiceServer(r, s)
	isthmusv1.RegisterDiagnosticServiceServer(r, s)
	r.registerRest()
}

// trial describes a change that the node reverts by itself unless it is confirmed.
func trial(within *durationpb.Duration) string {
	if within == nil {
		return ""
	}
	return fmt.Sprintf("to be confirmed within %v", within.AsDuration())
}

// why is the reason of a change in the audit log.
func why(message string) string {
	if message == "" {
		return ""
	}
	return "why: " + message
}

// joined joins the parts that are not empty.
func joined(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), ", ")
}

// describe returns the subject of a writing request for the audit log.
func describe(request any) auth.Subject {
	switch r := request.(type) {
	case *isthmusv1.ApplyRequest:
		return auth.Subject{Object: joined(trial(r.ConfirmWithin), why(r.Message)), Digest: digest(r.GetSource())}
	case *isthmusv1.EditPoliciesRequest:
		// The audit log shortens a long object, and keeps its beginning.
		var parts []string
		if r.DryRun {
			parts = append(parts, "dry run")
		}
		if r.ConfirmWithin != nil {
			parts = append(parts, trial(r.ConfirmWithin))
		}
		if r.Message != "" {
			parts = append(parts, why(r.Message))
		}
		for _, p := range r.Set {
			parts = append(parts, "set "+p.GetName())
		}
		for _, name := range r.Delete {
			parts = append(parts, "delete "+name)
		}
		subject := auth.Subject{Object: strings.Join(parts, ", ")}
		if r.Text != "" && len(r.Set)+len(r.Delete) == 0 {
			subject.Digest = hash([]byte(r.Text)) // as of the file
		} else {
			data, _ := proto.MarshalOptions{Deterministic: true}.Marshal(&isthmusv1.EditPoliciesRequest{Set: r.Set, Text: r.Text, Delete: r.Delete})
			subject.Digest = hash(data)
		}
		return subject
	case *isthmusv1.SetDisabledRequest:
		dry, verb := "", "enable"
		if r.DryRun {
			dry = "dry run"
		}
		if r.Disabled {
			verb = "disable"
		}
		parts := []string{dry, trial(r.ConfirmWithin), why(r.Message)}
		for _, name := range r.Tunnels {
			parts = append(parts, verb+" tunnel "+name)
		}
		for _, name := range r.Peers {
			parts = append(parts, verb+" peer "+name)
		}
		return auth.Subject{Object: joined(parts...)}
	case *isthmusv1.ConfirmRequest:
		return auth.Subject{Object: fmt.Sprintf("generation %d", r.Generation)}
	case *isthmusv1.RollbackRequest:
		dry := ""
		if r.DryRun {
			dry = "dry run"
		}
		return auth.Subject{Object: joined(dry, fmt.Sprintf("generation %d", r.ToGeneration), trial(r.ConfirmWithin), why(r.Message))}
	case *isthmusv1.ResetTunnelRequest:
		return auth.Subject{Object: r.Name}
	case *isthmusv1.ResetPeerRequest:
		return auth.Subject{Object: r.Name}
	case *isthmusv1.ProveEgressRequest:
		return auth.Subject{Object: strings.TrimSpace(strings.Join(append(slices.Clone(r.Destinations), r.Canary, r.CanarySource), " "))}
	case *isthmusv1.EndFlowsRequest:
		return auth.Subject{Object: strings.TrimSpace(fmt.Sprintf("from %s to %s %s", r.Source, cmp.Or(r.Destination, "everywhere"), r.Protocol))}
	case *isthmusv1.WhoRequest:
		at := "now"
		if r.At != nil {
			at = r.At.AsTime().Format(time.RFC3339)
		}
		return auth.Subject{Object: fmt.Sprintf("%s:%d at %s", r.Address, r.Port, at)}
	case *isthmusv1.PingRequest:
		by := ""
		if r.Tunnel != "" {
			by = " by tunnel " + r.Tunnel
		}
		return auth.Subject{Object: r.Address + by}
	case *isthmusv1.CaptureRequest:
		return auth.Subject{Object: captured(r)}
	case *isthmusv1.SetSecretRequest:
		return auth.Subject{Object: r.Name}
	case *isthmusv1.RollbackSecretRequest:
		return auth.Subject{Object: r.Name}
	case *isthmusv1.UpgradeRequest:
		h := r.GetHeader()
		return auth.Subject{Object: fmt.Sprintf("slot of %d bytes", h.GetSize()), Digest: hash([]byte(h.GetSignature()))}
	case *isthmusv1.SealRequest:
		subject := auth.Subject{Object: cmp.Or(r.With, "none")}
		if r.Abandon {
			subject.Object += ", abandoning secrets that cannot be read"
		}
		return subject
	case *isthmusv1.RenewAuthorityRequest:
		if r.AtOnce {
			return auth.Subject{Object: "at once"}
		}
	case *isthmusv1.DeleteSecretRequest:
		return auth.Subject{Object: r.Name}
	case *isthmusv1.IssueClientRequest:
		return auth.Subject{Object: r.Name + " as " + r.Role}
	case *isthmusv1.RenewClientRequest:
		return auth.Subject{Object: "the caller's certificate", Digest: hash(r.Csr)}
	case *isthmusv1.RevokeClientRequest:
		return auth.Subject{Object: r.Serial}
	}
	return auth.Subject{}
}

func digest(source *isthmusv1.Source) string {
	data := []byte(source.GetText())
	if m := source.GetSpec(); m != nil {
		data, _ = proto.MarshalOptions{Deterministic: true}.Marshal(m)
	}
	return hash(data)
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Caller returns the address that a call comes from, and the zero Addr for a call from the node
// itself.
func Caller(ctx context.Context) netip.Addr { return auth.AddressOf(ctx) }

func author(ctx context.Context) string { return auth.FromContext(ctx).Name }

func checkSource(s *isthmusv1.Source) error {
	switch {
	case s.GetSource() == nil:
		return reason.RequestInvalid.Errorf("source: give the document as spec or as text")
	case len(s.GetText()) > maxDocument:
		return reason.RequestInvalid.Errorf("source: the document has %d bytes, must have at most %d", len(s.GetText()), maxDocument)
	}
	return nil
}

func (s *services) Validate(ctx context.Context, r *isthmusv1.ValidateRequest) (*isthmusv1.ValidateResponse, error) {
	if err := checkSource(r.Source); err != nil {
		return nil, err
	}
	return in(ctx, s.reading, func() (*isthmusv1.ValidateResponse, error) { return s.router.Validate(ctx, r.Source) })
}

func (s *services) Plan(ctx context.Context, r *isthmusv1.PlanRequest) (*isthmusv1.PlanResponse, error) {
	if err := checkSource(r.Source); err != nil {
		return nil, err
	}
	return in(ctx, s.reading, func() (*isthmusv1.PlanResponse, error) { return s.router.Plan(ctx, r.Source) })
}

func (s *services) Apply(ctx context.Context, r *isthmusv1.ApplyRequest) (*isthmusv1.ApplyResponse, error) {
	if err := checkSource(r.Source); err != nil {
		return nil, err
	}
	if err := cmp.Or(checkConfirm(r.ConfirmWithin), checkMessage(r.Message)); err != nil {
		return nil, err
	}
	return in(ctx, s.writing, func() (*isthmusv1.ApplyResponse, error) { return s.router.Apply(ctx, author(ctx), r) })
}

// maxMessage is the length of the longest reason of a change, in bytes.
const maxMessage = 500

func checkMessage(m string) error {
	if len(m) > maxMessage || strings.ContainsFunc(m, unicode.IsControl) {
		return reason.RequestInvalid.Errorf("message: must be one line of at most %d bytes", maxMessage)
	}
	return nil
}

func checkConfirm(c *durationpb.Duration) error {
	if d := c.AsDuration(); c != nil && (!c.IsValid() || d < 10*time.Second || d > time.Hour) {
		return reason.RequestInvalid.Errorf("confirm_within %v: must be 10s to 1h", d)
	}
	return nil
}

func (s *services) EditPolicies(ctx context.Context, r *isthmusv1.EditPoliciesRequest) (*isthmusv1.ApplyResponse, error) {
	switch {
	case len(r.Set)+len(r.Delete) == 0 && r.Text == "":
		return nil, reason.RequestInvalid.Errorf("set: give policies to set, as set or as text, or names to delete")
	case len(r.Set) > 0 && r.Text != "":
		return nil, reason.RequestInvalid.Errorf("text: give policies as set or as text, not both")
	case len(r.Text) > maxDocument:
		return nil, reason.RequestInvalid.Errorf("text: has %d bytes, must have at most %d", len(r.Text), maxDocument)
	}
	if err := cmp.Or(checkConfirm(r.ConfirmWithin), checkMessage(r.Message)); err != nil {
		return nil, err
	}
	return in(ctx, s.writing, func() (*isthmusv1.ApplyResponse, error) { return s.router.EditPolicies(ctx, author(ctx), r) })
}

// maxDisabled bounds the objects of one SetDisabled.
const maxDisabled = 1000

func (s *services) SetDisabled(ctx context.Context, r *isthmusv1.SetDisabledRequest) (*isthmusv1.ApplyResponse, error) {
	if n := len(r.Tunnels) + len(r.Peers); n < 1 || n > maxDisabled {
		return nil, reason.RequestInvalid.Errorf("tunnels: %d names with those of peers, must be 1 to %d", n, maxDisabled)
	}
	if err := cmp.Or(checkConfirm(r.ConfirmWithin), checkMessage(r.Message)); err != nil {
		return nil, err
	}
	return in(ctx, s.writing, func() (*isthmusv1.ApplyResponse, error) { return s.router.SetDisabled(ctx, author(ctx), r) })
}

func (s *services) Confirm(ctx context.Context, r *isthmusv1.ConfirmRequest) (*isthmusv1.ConfirmResponse, error) {
	if r.Generation == 0 {
		return nil, reason.RequestInvalid.Errorf("generation: give the generation to keep")
	}
	return &isthmusv1.ConfirmResponse{}, statusOf(s.router.Confirm(ctx, author(ctx), r.Generation))
}

func (s *services) Rollback(ctx context.Context, r *isthmusv1.RollbackRequest) (*isthmusv1.ApplyResponse, error) {
	if err := cmp.Or(checkConfirm(r.ConfirmWithin), checkMessage(r.Message)); err != nil {
		return nil, err
	}
	return in(ctx, s.writing, func() (*isthmusv1.ApplyResponse, error) { return s.router.Rollback(ctx, author(ctx), r) })
}

// WaitApplied implements SpecService.
func (s *services) WaitApplied(ctx context.Context, r *isthmusv1.WaitAppliedRequest) (*isthmusv1.WaitAppliedResponse, error) {
	if d := r.MaxWait; d != nil && (!d.IsValid() || d.AsDuration() <= 0) {
		return nil, reason.RequestInvalid.Errorf("max_wait %v: must be more than 0s", d.AsDuration())
	}
	gone, err := s.applying.join(ctx)
	if err != nil {
		return nil, err
	}
	defer gone()
	until := ctx
	if r.MaxWait != nil {
		var cancel context.CancelFunc
		until, cancel = context.WithTimeout(ctx, r.MaxWait.AsDuration())
		defer cancel()
	}
	out := &isthmusv1.WaitAppliedResponse{Generation: r.Generation}
	for {
		changed := s.router.Changed()
		out.PresentGeneration, out.AppliedGeneration, err = s.router.Progress(out.Generation)
		if err != nil {
			return nil, statusOf(err)
		}
		if out.Generation == 0 {
			out.Generation = out.PresentGeneration
		}
		if out.Applied = out.AppliedGeneration >= out.Generation; out.Applied {
			return out, nil
		}
		err := wait(until, s.stopping, changed)
		if err == nil {
			// A busy node changes all the time.
			err = wait(until, s.stopping, time.After(watchPause))
		}
		switch {
		case err == nil:
		case ctx.Err() == nil && until.Err() != nil:
			st, _ := s.router.Status()
			for _, c := range st.GetConditions() {
				if c.Severity == "error" {
					out.Conditions = append(out.Conditions, c)
				}
			}
			return out, nil
		default:
			return nil, err
		}
	}
}

func (s *services) GetSpec(ctx context.Context, r *isthmusv1.GetSpecRequest) (*isthmusv1.GetSpecResponse, error) {
	return in(ctx, s.reading, func() (*isthmusv1.GetSpecResponse, error) { return s.router.Spec(ctx, r.Generation) })
}

func (s *services) GetEffectiveSpec(ctx context.Context, _ *isthmusv1.GetEffectiveSpecRequest) (*isthmusv1.GetSpecResponse, error) {
	return in(ctx, s.reading, func() (*isthmusv1.GetSpecResponse, error) { return s.router.EffectiveSpec(ctx) })
}

func (s *services) ResetTunnel(ctx context.Context, r *isthmusv1.ResetTunnelRequest) (*isthmusv1.ResetTunnelResponse, error) {
	return &isthmusv1.ResetTunnelResponse{}, statusOf(s.router.ResetTunnel(ctx, r.Name))
}

func (s *services) ResetPeer(ctx context.Context, r *isthmusv1.ResetPeerRequest) (*isthmusv1.ResetPeerResponse, error) {
	return &isthmusv1.ResetPeerResponse{}, statusOf(s.router.ResetPeer(ctx, r.Name, r.Soft))
}

func (s *services) ProveEgress(ctx context.Context, r *isthmusv1.ProveEgressRequest) (*isthmusv1.ProveEgressResponse, error) {
	proof, err := s.router.ProveEgress(ctx, r)
	if err != nil {
		return nil, statusOf(err)
	}
	statement, err := protojson.MarshalOptions{Multiline: true}.Marshal(proof)
	if err != nil {
		return nil, statusOf(err)
	}
	signature, certificate, err := s.authority.Sign(statement)
	if err != nil {
		return nil, statusOf(err)
	}
	return &isthmusv1.ProveEgressResponse{Proof: proof, Statement: statement, Signature: signature, Certificate: certificate}, nil
}

func (s *services) EndFlows(ctx context.Context, r *isthmusv1.EndFlowsRequest) (*isthmusv1.EndFlowsResponse, error) {
	return in(ctx, s.reading, func() (*isthmusv1.EndFlowsResponse, error) { return s.router.EndFlows(ctx, r) })
}

func (s *services) Who(ctx context.Context, r *isthmusv1.WhoRequest) (*isthmusv1.WhoResponse, error) {
	return in(ctx, s.reading, func() (*isthmusv1.WhoResponse, error) { return s.router.Who(ctx, r) })
}

func (s *services) GetStatus(context.Context, *isthmusv1.GetStatusRequest) (*isthmusv1.SystemStatus, error) {
	st, _ := s.router.Status()
	return st, nil
}

func (s *services) SetSecret(ctx context.Context, r *isthmusv1.SetSecretRequest) (*isthmusv1.SecretInfo, error) {
	return putSecret(ctx, r, s.router.SetSecret)
}

func (s *services) AddSecret(ctx context.Context, r *isthmusv1.SetSecretRequest) (*isthmusv1.SecretInfo, error) {
	return putSecret(ctx, r, s.router.AddSecret)
}

func putSecret(ctx context.Context, r *isthmusv1.SetSecretRequest, put func(context.Context, string, string, []byte) (*isthmusv1.SecretInfo, error)) (*isthmusv1.SecretInfo, error) {
	if !store.ValidSecretName(r.Name) {
		return nil, reason.RequestInvalid.Errorf("name %q: must be lower case letters, digits and hyphens, 1 to 63", r.Name)
	}
	if n := len(r.Value); n < 1 || n > 4096 {
		return nil, reason.RequestInvalid.Errorf("value: has %d bytes, must have 1 to 4096", n)
	}
	i, err := put(ctx, author(ctx), r.Name, r.Value)
	return i, statusOf(err)
}

func (s *services) DeleteSecret(ctx context.Context, r *isthmusv1.DeleteSecretRequest) (*isthmusv1.DeleteSecretResponse, error) {
	return &isthmusv1.DeleteSecretResponse{}, statusOf(s.router.DeleteSecret(ctx, author(ctx), r.Name))
}

func (s *services) RollbackSecret(ctx context.Context, r *isthmusv1.RollbackSecretRequest) (*isthmusv1.SecretInfo, error) {
	i, err := s.router.RollbackSecret(ctx, author(ctx), r.Name)
	return i, statusOf(err)
}

func (s *services) RenewAuthority(ctx context.Context, r *isthmusv1.RenewAuthorityRequest) (*isthmusv1.RenewAuthorityResponse, error) {
	if err := s.authority.MayRenew(ctx); err != nil {
		return nil, statusOf(err)
	}
	until, err := s.authority.Renew(r.AtOnce)
	if err != nil {
		return nil, statusOf(err)
	}
	response := &isthmusv1.RenewAuthorityResponse{Authority: s.authority.Certificate()}
	if !until.IsZero() {
		response.FormerUntil = timestamppb.New(until)
	}
	return response, nil
}

func (s *services) IssueClient(ctx context.Context, r *isthmusv1.IssueClientRequest) (*isthmusv1.IssueClientResponse, error) {
	role, err := auth.ParseRole(r.Role)
	if err != nil {
		return nil, reason.RequestInvalid.Errorf("%v", err)
	}
	if err := s.authority.MayIssue(ctx); err != nil {
		return nil, statusOf(err)
	}
	certificate, c, err := s.authority.Issue(r.Name, role, r.Csr, r.Lifetime.AsDuration())
	if err != nil {
		return nil, statusOf(err)
	}
	return &isthmusv1.IssueClientResponse{Certificate: certificate, Authority: s.authority.Certificate(), Client: client(c)}, nil
}

func (s *services) ListClients(context.Context, *isthmusv1.ListClientsRequest) (*isthmusv1.ListClientsResponse, error) {
	var out []*isthmusv1.Client
	for _, c := range s.authority.Clients() {
		out = append(out, client(c))
	}
	return &isthmusv1.ListClientsResponse{Clients: out}, nil
}

func (s *services) RevokeClient(_ context.Context, r *isthmusv1.RevokeClientRequest) (*isthmusv1.RevokeClientResponse, error) {
	return &isthmusv1.RevokeClientResponse{}, statusOf(s.authority.Revoke(r.Serial))
}

func (s *services) RenewClient(ctx context.Context, r *isthmusv1.RenewClientRequest) (*isthmusv1.RenewClientResponse, error) {
	certificate, c, err := s.authority.RenewClient(auth.FromContext(ctx), r.Csr)
	if err != nil {
		return nil, statusOf(err)
	}
	return &isthmusv1.RenewClientResponse{Certificate: certificate, Authority: s.authority.Certificate(), Client: client(c)}, nil
}

func client(c store.Client) *isthmusv1.Client {
	return &isthmusv1.Client{
		Name: c.Name, Role: c.Role, Serial: c.Serial, Revoked: c.Revoked,
		Issued: timestamppb.New(c.Issued), Expires: timestamppb.New(c.Expires), RenewedFrom: c.RenewedFrom,
	}
}
