package api_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
)

func upgrade(t *testing.T, conn *grpc.ClientConn, messages ...*isthmusv1.UpgradeRequest) (*isthmusv1.UpgradeResponse, error) {
	t.Helper()
	stream, err := isthmusv1.NewSystemServiceClient(conn).Upgrade(t.Context())
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		if err := stream.Send(m); errors.Is(err, io.EOF) {
			break // the answer says why
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return stream.CloseAndRecv()
}

// TestUpgrade checks that only an admin can stream a slot, and that the audit log has the accepted
// and the refused calls.
func TestUpgrade(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	admin := dialRole(t, s, auth.Admin)
	header := func(size int64, signature string) *isthmusv1.UpgradeRequest {
		return &isthmusv1.UpgradeRequest{Header: &isthmusv1.UpgradeHeader{Size: size, Signature: signature, Reboot: true}}
	}
	chunk := func(n int) *isthmusv1.UpgradeRequest { return &isthmusv1.UpgradeRequest{Chunk: make([]byte, n)} }

	_, err := upgrade(t, dialRole(t, s, auth.Operator), header(1, "1.1"), chunk(1))
	wantCode(t, "operator", err, codes.PermissionDenied)
	_, err = upgrade(t, admin)
	wantCode(t, "nothing", err, codes.InvalidArgument)
	_, err = upgrade(t, admin, chunk(1))
	wantCode(t, "no header", err, codes.InvalidArgument)
	_, err = upgrade(t, admin, header(1, "bad"), chunk(1))
	wantCode(t, "a wrong signature", err, codes.InvalidArgument)
	_, err = upgrade(t, admin, header(1, "old"), chunk(1))
	wantCode(t, "an older slot", err, codes.FailedPrecondition)
	_, err = upgrade(t, admin, header(3, "1.1"), chunk(1), chunk(1))
	wantCode(t, "too few bytes", err, codes.InvalidArgument)
	_, err = upgrade(t, admin, header(4<<20, "1.1"), chunk(2<<20), chunk(2<<20))
	wantCode(t, "a large message", err, codes.InvalidArgument)
	_, err = upgrade(t, admin, header(9, "1.1"), chunk(1), header(9, "1.2"))
	wantCode(t, "two headers", err, codes.InvalidArgument)
	r, err := upgrade(t, admin, header(3<<20, "1.1"), chunk(1<<20), chunk(1<<20), chunk(1<<20))
	if err != nil || r.Slot != "b" || r.Version != "1.1" {
		t.Fatal(r, err)
	}
	if m, err := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader)).GetMachine(t.Context(), &isthmusv1.GetMachineRequest{}); err != nil || !m.Slots[1].Running {
		t.Error(m, err)
	}

	var got []string
	for _, e := range auditLog(t, s) {
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s %s %s", e.Event, e.Who, e.Object, e.Result, e.Error)))
	}
	begin, end := "begin test-admin slot of %d bytes", "end test-admin slot of %d bytes %s"
	want := []string{
		"refused test-operator  PermissionDenied /isthmus.v1.SystemService/Upgrade needs role admin, test-operator has role operator",
		fmt.Sprintf(begin, 0), fmt.Sprintf(end, 0, "InvalidArgument the first message must have the header and nothing else"),
		fmt.Sprintf(begin, 1), fmt.Sprintf(end, 1, "InvalidArgument invalid request: signature does not belong to this slot"),
		fmt.Sprintf(begin, 1), fmt.Sprintf(end, 1, "FailedPrecondition not possible now: slot is older than the one that runs"),
		fmt.Sprintf(begin, 3), fmt.Sprintf(end, 3, "InvalidArgument invalid request: it ended after 2 of 3 bytes"),
		fmt.Sprintf(begin, 4<<20), fmt.Sprintf(end, 4<<20, "InvalidArgument each message after the first must have at most 1048576 bytes of the slot and no header"),
		fmt.Sprintf(begin, 9), fmt.Sprintf(end, 9, "InvalidArgument each message after the first must have at most 1048576 bytes of the slot and no header"),
		fmt.Sprintf(begin, 3<<20), fmt.Sprintf(end, 3<<20, "OK"),
	}
	if !slices.Equal(got, want) {
		t.Errorf("audit log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestPower(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	for role, code := range map[auth.Role]codes.Code{auth.Reader: codes.PermissionDenied, auth.Operator: codes.PermissionDenied, auth.Admin: codes.OK} {
		c := isthmusv1.NewSystemServiceClient(dialRole(t, s, role))
		_, err := c.Reboot(t.Context(), &isthmusv1.RebootRequest{})
		wantCode(t, "reboot by "+role.String(), err, code)
		_, err = c.PowerOff(t.Context(), &isthmusv1.PowerOffRequest{})
		wantCode(t, "poweroff by "+role.String(), err, code)
	}
	if got := strings.Join(s.Machine.Powered, " "); got != "reboot poweroff" {
		t.Error(got)
	}
	_, err := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Admin)).RollbackSlot(t.Context(), &isthmusv1.RollbackSlotRequest{})
	wantCode(t, "rollback to an empty slot", err, codes.FailedPrecondition)
}

// TestSeal checks that only an admin can seal and unseal, and that no line of the audit log has the
// recovery string.
func TestSeal(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	operator, admin := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Operator)), isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Admin))
	_, err := operator.Seal(t.Context(), &isthmusv1.SealRequest{With: "tpm2"})
	wantCode(t, "an operator seals", err, codes.PermissionDenied)
	_, err = operator.Unseal(t.Context(), &isthmusv1.UnsealRequest{Recovery: apitest.Recovery})
	wantCode(t, "an operator unseals", err, codes.PermissionDenied)
	_, err = admin.Seal(t.Context(), &isthmusv1.SealRequest{With: "rot13"})
	wantCode(t, "another seal", err, codes.InvalidArgument)
	if r, err := admin.Seal(t.Context(), &isthmusv1.SealRequest{With: "tpm2"}); err != nil || r.Recovery != apitest.Recovery {
		t.Fatal(r, err)
	}
	_, err = admin.Unseal(t.Context(), &isthmusv1.UnsealRequest{Recovery: "wrong"})
	wantCode(t, "a wrong string", err, codes.InvalidArgument)
	if _, err := admin.Unseal(t.Context(), &isthmusv1.UnsealRequest{Recovery: apitest.Recovery}); err != nil {
		t.Error(err)
	}
	if _, err := admin.Seal(t.Context(), &isthmusv1.SealRequest{Abandon: true}); err != nil {
		t.Error(err)
	}
	var begun []string
	for _, e := range auditLog(t, s) {
		if text := fmt.Sprintf("%+v", e); strings.Contains(text, apitest.Recovery) {
			t.Errorf("the audit log has the recovery string: %s", text)
		}
		if e.Event == auth.Begin {
			begun = append(begun, e.Method[strings.LastIndex(e.Method, "/")+1:]+" "+e.Object)
		}
	}
	if want := []string{"Seal rot13", "Seal tpm2", "Unseal ", "Unseal ", "Seal none, abandoning secrets that cannot be read"}; !slices.Equal(begun, want) {
		t.Errorf("%q, want %q", begun, want)
	}
}
