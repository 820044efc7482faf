// Package reason lists the reasons of errors of the API: short names that programs can rely on,
// whatever the text of an error says.
package reason

import (
	"fmt"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
)

// Domain is the domain of the reasons (google.rpc.ErrorInfo).
const Domain = "isthmus"

// Reason is one reason why a call fails. Its name and its code never change.
type Reason struct {
	Name    string
	Code    codes.Code
	Meaning string // with the remedy of a program, in Markdown
	// Metadata describes the keys of the metadata; empty: there is none.
	Metadata string
}

// All has every reason, by code and then in the order of the page.
var All []*Reason

func define(name string, code codes.Code, meaning, metadata string) *Reason {
	r := &Reason{name, code, meaning, metadata}
	All = append(All, r)
	return r
}

// The reasons.
var (
	RequestInvalid  = define("REQUEST_INVALID", codes.InvalidArgument, "A field of the request has a value that no state of the node allows. BadRequest names the field. Do not repeat the call as it is.", "")
	DocumentInvalid = define("DOCUMENT_INVALID", codes.InvalidArgument, "The document or the edit has problems. Problems lists them; BadRequest has the first ones.", "")
	PageToken       = define("PAGE_TOKEN_INVALID", codes.InvalidArgument, "The page or resume token is of another call, filter or log. Begin again without it.", "")

	NotFound           = define("NOT_FOUND", codes.NotFound, "An object of that name does not exist.", "")
	NotFoundTunnel     = define("NOT_FOUND_TUNNEL", codes.NotFound, "No tunnel has the name.", "`name`")
	NotFoundPeer       = define("NOT_FOUND_PEER", codes.NotFound, "No peer has the name.", "`name`")
	NotFoundPool       = define("NOT_FOUND_POOL", codes.NotFound, "No pool has the name.", "`name`")
	NotFoundSecret     = define("NOT_FOUND_SECRET", codes.NotFound, "No secret has the name.", "")
	NotFoundGeneration = define("NOT_FOUND_GENERATION", codes.NotFound, "The history does not have the generation, or the node does not have a document yet.", "")

	GenerationChanged = define("GENERATION_CHANGED", codes.Aborted, "Another change was accepted meanwhile. Read the document again, and repeat the change on top of it.", "")

	BGPRestarted = define("BGP_RESTARTED", codes.Aborted, "The BGP process was started again while its routes were listed. List them again from the start.", "")

	NotPossibleNow = define("NOT_POSSIBLE_NOW", codes.FailedPrecondition, "The state of the node does not allow the call. The text says what is in the way.", "")
	NoDocument     = define("NO_DOCUMENT", codes.FailedPrecondition, "The node does not have a document to edit. Apply one first.", "")
	NotConfirmed   = define("NOT_CONFIRMED", codes.FailedPrecondition, "The generation was not confirmed in time, and the former one is in force again.", "")
	SecretExists   = define("SECRET_EXISTS", codes.FailedPrecondition, "Another value is stored under the name. SetSecret replaces it.", "")
	SecretsSealed  = define("SECRETS_SEALED", codes.FailedPrecondition, "The secrets are sealed, and the seal is closed. Unseal opens it.", "")
	ClockWrong     = define("CLOCK_WRONG", codes.FailedPrecondition, "The clock of the node is wrong, so that it issues no certificates.", "")
	StateNewer     = define("STATE_NEWER", codes.FailedPrecondition, "A newer version of isthmusd has written the state.", "")
	MachineRefused = define("MACHINE_REFUSED", codes.FailedPrecondition, "The machine cannot do that now: it has no slots or no TPM, or another upgrade is under way.", "")

	CallerUnknown      = define("CALLER_UNKNOWN", codes.Unauthenticated, "The connection has no client certificate.", "")
	CertificateRevoked = define("CERTIFICATE_REVOKED", codes.Unauthenticated, "The certificate of the caller is revoked.", "")
	CertificateExpired = define("CERTIFICATE_EXPIRED", codes.Unauthenticated, "The certificate of the caller has expired. An admin issues a new one.", "")
	PermissionRole     = define("PERMISSION_ROLE", codes.PermissionDenied, "The method needs a higher role than that of the certificate.", "`method`, `role` of the caller, `needed`")
	MethodNotAllowed   = define("METHOD_NOT_ALLOWED", codes.PermissionDenied, "The server does not have the method: its version is older than that of the client.", "`method`")
	RateLimited        = define("RATE_LIMITED", codes.ResourceExhausted, "The client calls too often. Wait a second, then twice as long each time.", "")
	TooManyStreams     = define("TOO_MANY_STREAMS", codes.ResourceExhausted, "The client has too many open watches. Close some.", "")
	TooManyCalls       = define("TOO_MANY_CALLS", codes.ResourceExhausted, "Too many calls with documents, or that wait, ping or capture, are under way. Try again later.", "")
	TooMany            = define("TOO_MANY_OBJECTS", codes.ResourceExhausted, "The node stores no more objects of the kind. Delete some.", "")
	StateFull          = define("STATE_FULL", codes.ResourceExhausted, "The disk of the state directory is full. See the condition StateFull.", "")
	AuditFailed        = define("AUDIT_FAILED", codes.Unavailable, "The audit log cannot be written, so that nothing is changed.", "")
	Stopping           = define("STOPPING", codes.Unavailable, "The server stops. Connect again, and continue a watch with its resume token.", "")
	BGPDown            = define("BGP_DOWN", codes.Unavailable, "The BGP process does not run. It is started again by itself: call again in a few seconds.", "")
	NotManaged         = define("NOT_MANAGED", codes.Unimplemented, "This daemon does not manage the machine, or records no events.", "")
	StateDamaged       = define("STATE_DAMAGED", codes.DataLoss, "A file of the state is damaged.", "")
	Canceled           = define("CANCELED", codes.Canceled, "The caller has gone.", "")
	DeadlineExceeded   = define("DEADLINE_EXCEEDED", codes.DeadlineExceeded, "The time of the call is over. Whether a change was made is unknown: compare the generation.", "")
	BGPSilent          = define("BGP_SILENT", codes.DeadlineExceeded, "The BGP process did not answer in time. Call again later.", "")
	Internal           = define("INTERNAL", codes.Internal, "An error that the caller cannot remedy. The text and the log of isthmusd say more.", "")
	PanicOfTheDaemon   = define("PANIC", codes.Internal, "The call met a fault of isthmusd, which continues to run. Report it with the lines of its log.", "")
)

// unclassified are the reasons of errors that have none, which gRPC makes.
var (
	unclassified = map[codes.Code]*Reason{
		codes.InvalidArgument: RequestInvalid, codes.NotFound: NotFound, codes.Aborted: GenerationChanged, codes.FailedPrecondition: NotPossibleNow,
		codes.PermissionDenied: MethodNotAllowed, codes.ResourceExhausted: TooManyCalls, codes.Unavailable: Stopping, codes.Unimplemented: NotManaged,
		codes.DataLoss: StateDamaged, codes.Canceled: Canceled, codes.DeadlineExceeded: DeadlineExceeded,
	}
)

// Errorf returns a status with the reason. A text of REQUEST_INVALID that begins with the name of a
// field, as "page_size 0: must be 1 to 100", also gets it as BadRequest.
func (r *Reason) Errorf(format string, args ...any) error {
	return r.with(nil, fmt.Sprintf(format, args...))
}

// With is Errorf with metadata: pairs of a key and a value.
func (r *Reason) With(metadata map[string]string, format string, args ...any) error {
	return r.with(metadata, fmt.Sprintf(format, args...))
}

// Detailed returns a status with the reason behind other details.
func (r *Reason) Detailed(text string, details ...protoadapt.MessageV1) error {
	return r.with(nil, text, details...)
}

func (r *Reason) with(metadata map[string]string, text string, details ...protoadapt.MessageV1) error {
	s := status.New(r.Code, text)
	details = append(details, &errdetails.ErrorInfo{Reason: r.Name, Domain: Domain, Metadata: metadata})
	if field, ok := fieldOf(text); ok && r == RequestInvalid {
		details = append(details, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: text}}})
	}
	d, err := s.WithDetails(details...)
	if err != nil {
		return s.Err() // cannot happen: only for the code OK and for messages that cannot be encoded
	}
	return d.Err()
}

// maxViolations bounds the violations of one answer. A client that needs all uses Problems.
const maxViolations = 20

// Violations returns pairs of a field and what is wrong with it as BadRequest.
func Violations(pairs [][2]string) *errdetails.BadRequest {
	b := &errdetails.BadRequest{}
	for _, p := range pairs[:min(len(pairs), maxViolations)] {
		b.FieldViolations = append(b.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: short(p[0]), Description: short(p[1])})
	}
	return b
}

func short(s string) string {
	const most = 200 // bytes
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "")
	}
	return strings.ToValidUTF8(s, "?")
}

// fieldOf returns the field that the text of an error begins with: its name in the proto, before a
// colon or a space with the value.
func fieldOf(text string) (string, bool) {
	head, _, ok := strings.Cut(strings.TrimPrefix(text, "invalid request: "), ":")
	field, value, _ := strings.Cut(head, " ")
	wrong := strings.Contains(value, " ")
	wrong = wrong || strings.ContainsFunc(field, func(r rune) bool { return r != '_' && (r < 'a' || r > 'z') })
	return field, ok && field != "" && !wrong
}

// Again returns the error with another text, and the same code and details.
func Again(err error, text string) error {
	p := status.Convert(err).Proto()
	p.Message = text
	return status.ErrorProto(p)
}

// Of returns the reason of an error of the API; empty: it has none.
func Of(err error) string {
	for _, d := range status.Convert(err).Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok && i.Domain == Domain {
			return i.Reason
		}
	}
	return ""
}

// Ensure returns the error with the reason of its code, unless it has one already. Nil stays nil.
func Ensure(err error) error {
	if err == nil || Of(err) != "" {
		return err
	}
	s := status.Convert(err)
	r := unclassified[s.Code()]
	if r == nil {
		r = Internal
	}
	if d, derr := s.WithDetails(&errdetails.ErrorInfo{Reason: r.Name, Domain: Domain}); derr == nil {
		return d.Err()
	}
	return err
}
