package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (a *app) addEgress(root, _, _, _ *cobra.Command) {
	group := a.group("egress", "Prove the source addresses that partners see")
	group.AddCommand(a.egressProve(), a.egressVerify())
	root.AddCommand(group)
}

func (a *app) egressProve() *cobra.Command {
	q := &isthmusv1.ProveEgressRequest{}
	cmd := &cobra.Command{Use: "prove --to PREFIX", Short: "Prove which source addresses flows to a destination may have", Args: cobra.NoArgs,
		Long: `Derive from the rules in the kernel every source address that flows to some destinations may have: now, and with any one
address of a pool down. The command follows the rules with sets of packets, so the answer holds for every packet, not only for
samples. It fails if an address is not expected, if a flow may leave untranslated, or if the rules in the kernel are not exactly
those of the document.

With --canary the node calls a URL from each address that flows may have. This shows how the platform translates the address, and
that the partner answers; these packets are the node's own and are not forwarded. With --canary-from as well, the call comes from
an inside address that no host uses, and its packets are forwarded like those of a host there: rules for forwarded packets, of any
table, apply to them.

With -o json the answer contains the proof as signed by the node; "isthmus egress verify" checks it on any machine.`}
	f := cmd.Flags()
	f.StringSliceVar(&q.Destinations, "to", nil, "destination prefixes (at least one)")
	f.StringSliceVar(&q.Sources, "from", nil, "source prefixes (default: all sources)")
	f.StringSliceVar(&q.Expect, "expect", nil, "public addresses that are allowed (default: those of the pools of the policies that may match)")
	f.StringVar(&q.Canary, "canary", "", "URL that answers with the caller's address; the node calls it from each address that flows may have")
	f.StringVar(&q.CanarySource, "canary-from", "", "inside address, among the sources of an attachment and of a policy, that no host uses; the canary is called from it, by forwarded packets")
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		if len(q.Destinations) == 0 {
			return usageError{errors.New("--to is missing: give at least one destination prefix")}
		}
		r, err := isthmusv1.NewNATServiceClient(conn).ProveEgress(ctx, q)
		if err != nil {
			return err
		}
		if !a.tables() {
			err = a.showMessage(r)
		} else {
			err = a.showProof(r.Proof)
		}
		if err == nil && !r.Proof.Holds {
			return errors.New("the proof does not hold")
		}
		return err
	})
	a.outputFlag(cmd)
	return cmd
}

func (a *app) showProof(p *isthmusv1.EgressProof) error {
	var b strings.Builder
	verdict := "HOLDS"
	if !p.Holds {
		verdict = "DOES NOT HOLD"
	}
	fmt.Fprintf(&b, "Node %s, generation %d, %s: %s\n", p.Node, p.Generation, p.Time.AsTime().Format("2006-01-02 15:04:05 MST"), verdict)
	fmt.Fprintf(&b, "  from      %s\n  to        %s\n  expected  %s\n", strings.Join(p.Sources, ", "), strings.Join(p.Destinations, ", "), list(p.Expected))
	fmt.Fprintf(&b, "  guard     kept %d packets (%s) from leaving\n\n", p.GuardPackets, bytesText(p.GuardBytes))
	width := 0
	for _, s := range p.States {
		width = max(width, len(s.Name))
	}
	for _, s := range p.States {
		fmt.Fprintf(&b, "  %-*s  may be seen as %s", width, s.Name, list(s.PublicAddresses))
		if len(s.Untranslated) > 0 {
			fmt.Fprintf(&b, ", untranslated: %s", strings.Join(s.Untranslated, ", "))
		}
		b.WriteString("\n")
	}
	for _, c := range p.Canaries {
		fmt.Fprintf(&b, "  canary from %s: seen as %s", c.Address, list([]string{clean(c.SeenAs)}))
		if c.Error != "" {
			fmt.Fprintf(&b, " (%s)", clean(c.Error))
		}
		b.WriteString("\n")
	}
	for _, v := range p.Violations {
		fmt.Fprintf(&b, "\nviolation: %s", clean(v))
	}
	if len(p.Violations) > 0 {
		b.WriteString("\n")
	}
	_, err := fmt.Fprint(a.stdout, b.String())
	return err
}

func list(items []string) string {
	if text := strings.Join(items, ", "); text != "" {
		return text
	}
	return "nothing"
}

func (a *app) egressVerify() *cobra.Command {
	var authority string
	cmd := &cobra.Command{Use: "verify FILE", Short: "Check the signature of a proof (works without a node)", Args: cobra.ExactArgs(1), ValidArgsFunction: files,
		Long: `Check that a node of the authority signed a proof, as printed by "isthmus egress prove -o json", and print the proof.
- is standard input.`}
	cmd.Flags().StringVar(&authority, "authority", "", "file with the authority's certificate in PEM (default: that of the context)")
	completeFlag(cmd, "authority", files)
	cmd.RunE = runs(func(_ *cobra.Command, args []string) error {
		roots := x509.NewCertPool()
		if authority != "" {
			data, err := os.ReadFile(authority)
			if err != nil {
				return fmt.Errorf("reading the authority: %w", err)
			}
			if !roots.AppendCertsFromPEM(data) {
				return fmt.Errorf("reading the authority: %s holds no certificate in PEM", authority)
			}
		} else {
			c, err := a.loadContext(a.contextPath())
			if err != nil {
				return fmt.Errorf("%w; or give the authority's certificate with --authority", err)
			}
			if !roots.AppendCertsFromPEM([]byte(c.Authority)) {
				return errors.New("reading the context: its authority is not a certificate in PEM")
			}
		}
		data, err := a.readInput(args[0], maxAnswer)
		if err != nil {
			return fmt.Errorf("reading %s: %w", args[0], err)
		}
		proof, err := verifyProof(data, roots)
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		if err := a.showProof(proof); err != nil {
			return err
		}
		if !proof.Holds {
			return errors.New("the signature is valid, but the proof does not hold")
		}
		return nil
	})
	return cmd
}

// verifyProof returns the signed statement after checking its certificate and signature.
func verifyProof(data []byte, roots *x509.CertPool) (*isthmusv1.EgressProof, error) {
	r := &isthmusv1.ProveEgressResponse{}
	if err := protojson.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("it is not a signed proof: %w", err)
	}
	block, _ := pem.Decode([]byte(r.Certificate))
	if block == nil {
		return nil, errors.New("it is not a signed proof: it has no certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading its certificate: %w", err)
	}
	proof := &isthmusv1.EgressProof{}
	if err := protojson.Unmarshal(r.Statement, proof); err != nil {
		return nil, fmt.Errorf("reading its statement: %w", err)
	}
	// Verify at the time of the signature: nodes replace their certificates long before the end.
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: defaultServerName, CurrentTime: proof.Time.AsTime()}); err != nil {
		return nil, fmt.Errorf("its certificate is not of this authority: %w", err)
	}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	sum := sha256.Sum256(r.Statement)
	if !ok || !ecdsa.VerifyASN1(key, sum[:], r.Signature) {
		return nil, errors.New("the signature is not of this statement")
	}
	return proof, nil
}
