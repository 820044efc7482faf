package reason

import (
	"errors"
	"regexp"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestTable checks that names are unique, and that the reason of a code has that code.
func TestTable(t *testing.T) {
	names := map[string]bool{}
	for _, r := range All {
		if names[r.Name] || !regexp.MustCompile(`^[A-Z][A-Z_]*[A-Z]$`).MatchString(r.Name) || r.Meaning == "" || r.Code == codes.OK {
			t.Errorf("%+v", r)
		}
		names[r.Name] = true
	}
	for code, r := range unclassified {
		if r.Code != code {
			t.Errorf("%v has the reason %+v", code, r)
		}
	}
}

// TestFields checks which texts name a field.
func TestFields(t *testing.T) {
	for text, want := range map[string]string{
		"page_size 0: must be 1 to 100": "page_size",
		"source: give the document":     "source",
		"the first message must: have":  "",
		"invalid request: name":         "",
		"invalid request: to: needed":   "to",
		"Name: upper case":              "",
		"nothing":                       "",
	} {
		err := RequestInvalid.Errorf("%s", text)
		got := ""
		for _, d := range status.Convert(err).Details() {
			if b, ok := d.(*errdetails.BadRequest); ok {
				got = b.FieldViolations[0].Field
			}
		}
		if got != want || Of(err) != "REQUEST_INVALID" {
			t.Errorf("%q: field %q, want %q, reason %s", text, got, want, Of(err))
		}
	}
}

func TestEnsure(t *testing.T) {
	for want, err := range map[string]error{
		"":                   nil,
		"GENERATION_CHANGED": GenerationChanged.Errorf("x"),
		"INTERNAL":           errors.New("x"),
		"REQUEST_INVALID":    status.Error(codes.InvalidArgument, "x"),
	} {
		if got := Ensure(err); Of(got) != want || err != nil && status.Convert(got).Message() != "x" || status.Code(got) != status.Code(err) {
			t.Errorf("%v became %v with the reason %q", err, got, Of(got))
		}
	}
	err := PermissionRole.With(map[string]string{"role": "reader"}, "no")
	if again := Again(err, "no, and more"); Of(again) != "PERMISSION_ROLE" || status.Code(again) != codes.PermissionDenied || status.Convert(again).Message() != "no, and more" {
		t.Errorf("%v", again)
	}
}
