package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

const (
	// slotChunk is how many bytes of a slot are in one message, and slotLimit the most that a slot
	// is taken to have.
	slotChunk = 256 << 10
	slotLimit = 1 << 30
	// signatureLimit bounds the file of a signature.
	signatureLimit = 2048
	// upgradeWait is how long `system upgrade` waits for the verdict: three boots, and the time in
	// which a slot has to become good.
	upgradeWait = 30 * time.Minute
)

// machinePace is the interval of polls while a node reboots.
var machinePace = 3 * time.Second

var slotColumns = []column[*isthmusv1.Slot]{
	{header: "SLOT", value: func(_ *app, s *isthmusv1.Slot) string { return s.Name }},
	{header: "VERSION", value: func(_ *app, s *isthmusv1.Slot) string { return s.Version }},
	{header: "STATE", value: func(a *app, s *isthmusv1.Slot) string { return slotState(a, s) }},
	{header: "KEY", value: func(_ *app, s *isthmusv1.Slot) string { return s.Key }},
	{header: "SERIAL", wide: true, value: func(_ *app, s *isthmusv1.Slot) string { return fmt.Sprint(s.Serial) }},
}

func slotState(a *app, s *isthmusv1.Slot) string {
	var words []string
	if s.Version == "" {
		words = append(words, "empty")
	}
	if s.Running {
		words = append(words, "running")
	}
	if s.Good {
		words = append(words, "good")
	}
	switch {
	case s.Trial && s.Running:
		words = append(words, "on trial, given up in "+a.left(s.Deadline))
	case s.Trial:
		words = append(words, fmt.Sprintf("on trial, %d boots left", s.Tries))
	}
	return strings.Join(words, ", ")
}

func (a *app) addMachine(system *cobra.Command) {
	show := &cobra.Command{Use: "status", Short: "Show slots, firmware and trusted keys", Args: cobra.NoArgs,
		Long: `Show the two slots that the machine boots from, the keys trusted to sign slots, and the firmware.

The machine boots the slot that was marked good last. An upgraded slot is on trial: if it is not marked good within three boots,
the machine returns to the good one. It is marked good when charon answers, the rules are in the kernel, the API serves, the
document is applied, and the tunnels and sessions that were up before the upgrade are up again.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			m, err := isthmusv1.NewSystemServiceClient(conn).GetMachine(ctx, &isthmusv1.GetMachineRequest{})
			if err != nil {
				return err
			}
			return a.showMachine(m)
		})}
	a.outputFlag(show)

	var file, signature string
	var older, later bool
	upgrade := &cobra.Command{Use: "upgrade -f SLOT", Short: "Write a signed slot, boot from it, and wait for its verdict", Args: cobra.NoArgs,
		Long: `Send a slot to the node, which checks its signature, writes it to the slot that does not run, reads it back, and boots from it.
Wait until the node has marked the slot good, or has returned to the former one; then the exit code is 1.

The node has no tunnels, routes and source NAT while the machine boots. The document, secrets and certificates stay.
A slot older than the running one is refused without --older.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			if signature == "" {
				signature = file + ".minisig"
			}
			return a.upgrade(ctx, conn, file, signature, older, later)
		})}
	upgrade.Flags().StringVarP(&file, "filename", "f", "", "the `file` of the slot")
	upgrade.Flags().StringVar(&signature, "signature", "", "`file` of its signature (default: the slot's file with .minisig)")
	upgrade.Flags().BoolVar(&older, "older", false, "accept a slot that is older than the running one")
	upgrade.Flags().BoolVar(&later, "later", false, "do not reboot; the next boot tries the slot")
	_ = upgrade.MarkFlagRequired("filename")
	completeFlag(upgrade, "filename", files)
	completeFlag(upgrade, "signature", files)

	rollback := &cobra.Command{Use: "rollback", Short: "Boot the machine from the other slot", Args: cobra.NoArgs,
		Long: `Boot the machine from the other slot, and wait for it. A slot on trial is given up. Otherwise the other slot is on trial as
after an upgrade, and kept if tunnels and sessions come up as before.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			r, err := isthmusv1.NewSystemServiceClient(conn).RollbackSlot(ctx, &isthmusv1.RollbackSlotRequest{})
			if err != nil {
				return fmt.Errorf("rolling back: %w", err)
			}
			a.note("the machine starts from slot %s", clean(r.Slot))
			return a.awaitSlot(ctx, conn, r.Slot)
		})}

	reboot := &cobra.Command{Use: "reboot", Short: "Reboot the machine", Args: cobra.NoArgs,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			_, err := isthmusv1.NewSystemServiceClient(conn).Reboot(ctx, &isthmusv1.RebootRequest{})
			return err
		})}
	poweroff := &cobra.Command{Use: "poweroff", Short: "Power the machine off", Args: cobra.NoArgs,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			_, err := isthmusv1.NewSystemServiceClient(conn).PowerOff(ctx, &isthmusv1.PowerOffRequest{})
			return err
		})}
	system.AddCommand(show, upgrade, rollback, reboot, poweroff, a.sealCommand(), a.unsealCommand())
}

func (a *app) sealCommand() *cobra.Command {
	var abandon bool
	cmd := &cobra.Command{Use: "seal tpm2|none", Short: "Move the key of the secrets into the machine's TPM, or back to the disk", Args: cobra.ExactArgs(1), ValidArgs: []string{"tpm2", "none"},
		Long: `Encrypt the secrets with a new key that only the machine's TPM 2.0 opens, and print the recovery string, which opens it
without the TPM. The string is shown once: keep it away from the node. With none, the key is stored on the disk again.

A copy of the disk does not open on another machine then, nor on this one after a change of Secure Boot or of its keys
(PCR 7). The node still starts and serves its API, with the condition Sealed: see isthmus system unseal.
Pre-shared keys, WireGuard keys and BGP passwords are sealed. The keys of the API are not, since it has to serve then.
Former contents may remain in unused blocks of the disk: seal a node before it gets its secrets, or replace them
afterwards. A slot of a version without seals cannot read the secrets: run seal none before going back to one.

With --abandon the command makes a new key even if the secrets cannot be read: then set them again, with isthmus secret set.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			with := args[0]
			if with == "none" {
				with = ""
			}
			r, err := isthmusv1.NewSystemServiceClient(conn).Seal(ctx, &isthmusv1.SealRequest{With: with, Abandon: abandon})
			if err != nil {
				return fmt.Errorf("sealing with %s: %w", args[0], err)
			}
			if r.Recovery == "" {
				a.note("the secrets are encrypted with the node key, which is on the same disk")
				return nil
			}
			a.note("the secrets are sealed. This is the recovery string, which is not shown again:")
			_, err = fmt.Fprintln(a.stdout, clean(r.Recovery))
			return err
		})}
	cmd.Flags().BoolVar(&abandon, "abandon", false, "make a new key even if the secrets cannot be read")
	return cmd
}

func (a *app) unsealCommand() *cobra.Command {
	return &cobra.Command{Use: "unseal", Short: "Open sealed secrets with their recovery string", Args: cobra.NoArgs,
		Long: `Open the seal of the secrets with the recovery string that isthmus system seal has printed, and seal the key for the present
state of the machine. The string is read from standard input (a terminal does not show it). Tunnels and peers that wait for the
secrets are created at once.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			text, err := a.readSecret(ctx, "the recovery string")
			if err != nil {
				return fmt.Errorf("reading the recovery string: %w", err)
			}
			r, err := isthmusv1.NewSystemServiceClient(conn).Unseal(ctx, &isthmusv1.UnsealRequest{Recovery: strings.TrimSpace(string(text))})
			if err != nil {
				return fmt.Errorf("unsealing: %w", err)
			}
			if r.NotSealed != "" {
				fmt.Fprintln(a.stderr, "isthmus: the secrets can be read, but the next start needs the recovery string again: "+clean(r.NotSealed))
				return nil
			}
			a.note("the secrets can be read, and are sealed for the machine as it is now")
			return nil
		})}
}

func (a *app) showMachine(m *isthmusv1.Machine) error {
	if err := show(a, slotColumns, m.Slots, m); err != nil || !a.tables() {
		return err
	}
	if len(m.Slots) == 0 {
		fmt.Fprintln(a.stdout, "this machine has no slots: isthmus comes from a package, and is upgraded with apt")
	} else {
		fmt.Fprintf(a.stdout, "trusted keys  %s\n", clean(strings.Join(m.Keys, ", ")))
	}
	firmware := m.Firmware
	if m.SecureBoot {
		firmware += ", Secure Boot"
	}
	tpm := "none"
	if m.Tpm {
		tpm = "yes"
		if m.Pcr7 != "" {
			tpm += ", PCR 7 " + m.Pcr7
		}
	}
	fmt.Fprintf(a.stdout, "firmware      %s\nTPM           %s\nlockdown      %s\n", clean(firmware), clean(tpm), clean(m.Lockdown))
	secrets := "encrypted with a key on the same disk"
	if m.Seal != "" {
		secrets = "sealed with " + m.Seal
	}
	if m.Sealed != "" {
		secrets += "; closed: " + m.Sealed
	}
	fmt.Fprintf(a.stdout, "secrets       %s\n", clean(secrets))
	for _, s := range m.Slots {
		for _, missing := range s.Missing {
			fmt.Fprintf(a.stdout, "slot %s lacks   %s\n", clean(s.Name), clean(missing))
		}
	}
	if m.Failed != "" {
		fmt.Fprintf(a.stdout, "last trial    given up: %s\n", clean(m.Failed))
	}
	return nil
}

func (a *app) upgrade(ctx context.Context, conn *grpc.ClientConn, file, signature string, older, later bool) error {
	text, err := readBounded(signature, signatureLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the signature %s is missing: fetch the file that was published with the slot, or name it with --signature", signature)
	}
	if err != nil {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Size() > slotLimit {
		return fmt.Errorf("%s is not a slot: it must be a file of at most %d MiB", file, slotLimit>>20)
	}
	r, err := a.sendSlot(ctx, conn, f, &isthmusv1.UpgradeHeader{Size: fi.Size(), Signature: string(text), Older: older, Reboot: !later})
	if err != nil {
		return fmt.Errorf("upgrading with %s: %w", file, err)
	}
	a.note("version %s is in slot %s", clean(r.Version), clean(r.Slot))
	if later {
		a.note("the next start tries it: isthmus system reboot")
		return nil
	}
	return a.awaitSlot(ctx, conn, r.Slot)
}

func (a *app) sendSlot(ctx context.Context, conn *grpc.ClientConn, from io.Reader, h *isthmusv1.UpgradeHeader) (*isthmusv1.UpgradeResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := isthmusv1.NewSystemServiceClient(conn).Upgrade(ctx)
	if err != nil {
		return nil, err
	}
	// CloseAndRecv returns the reason when Send fails.
	send := func(r *isthmusv1.UpgradeRequest) bool { return stream.Send(r) == nil }
	buf := make([]byte, slotChunk)
	sent, told := int64(0), int64(0)
	for ok := send(&isthmusv1.UpgradeRequest{Header: h}); ok; {
		n, err := io.ReadFull(from, buf)
		if n > 0 {
			ok = send(&isthmusv1.UpgradeRequest{Chunk: buf[:n]})
			sent += int64(n)
		}
		if percent := sent * 100 / max(h.Size, 1); percent >= told+20 {
			told = percent
			a.note("sent %d %%", percent)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	return stream.CloseAndRecv()
}

// awaitSlot waits until the node runs a slot that is good, and returns an error when that is not
// the wanted one.
func (a *app) awaitSlot(ctx context.Context, conn *grpc.ClientConn, want string) error {
	ctx, cancel := context.WithTimeout(ctx, upgradeWait)
	defer cancel()
	client := isthmusv1.NewSystemServiceClient(conn)
	var last string
	tell := func(text string) {
		if text != last {
			last = text
			a.note("%s", clean(text))
		}
	}
	for gone := false; ; {
		m, err := client.GetMachine(ctx, &isthmusv1.GetMachineRequest{})
		switch code := status.Code(err); {
		case err == nil:
			done, text, err := verdict(m, want, gone)
			if text != "" {
				tell(text)
			}
			if done {
				return err
			}
		case ctx.Err() != nil:
		case code == codes.Unavailable || code == codes.DeadlineExceeded:
			gone = true
			tell("the node starts")
		default:
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for slot %s: %w; look at the machine's console", want, ctx.Err())
		case <-time.After(machinePace):
		}
	}
}

// verdict says whether the wanted slot was marked good or given up, and returns the progress until
// then.
func verdict(m *isthmusv1.Machine, want string, gone bool) (done bool, text string, err error) {
	for _, s := range m.Slots {
		switch {
		case s.Name == want && s.Running && s.Good && !s.Trial:
			return true, fmt.Sprintf("slot %s, version %s, is good", s.Name, s.Version), nil
		case s.Name == want && s.Running && s.Trial && len(s.Missing) > 0:
			return false, fmt.Sprintf("slot %s runs; not as before: %s", s.Name, strings.Join(s.Missing, "; ")), nil
		case s.Name == want && s.Running && s.Trial:
			return false, fmt.Sprintf("slot %s runs, and all is as before", s.Name), nil
		case s.Name != want && s.Running && m.Failed != "":
			return true, "", fmt.Errorf("slot %s was given up, and slot %s runs: %s", want, s.Name, m.Failed)
		case s.Name != want && s.Running && gone:
			return false, fmt.Sprintf("slot %s runs", s.Name), nil
		}
	}
	return false, "", nil
}

// readBounded reads a file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return text, err
}
