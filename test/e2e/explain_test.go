package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/peer"
)

// TestExplained makes two common mistakes, and checks that the command line explains them.
func TestExplained(t *testing.T) {
	b := begin(t)
	shows := func(what string, words ...string) {
		b.Helper()
		b.until(60*time.Second, func() error {
			out := b.cli(strings.Fields(what)...)
			for _, w := range words {
				if !strings.Contains(out, w) {
					return fmt.Errorf("isthmus %s does not say %q:\n%s", what, w, out)
				}
			}
			return nil
		})
		b.Logf("isthmus %s\n%s", what, b.cli(strings.Fields(what)...))
	}
	full := b.c.Document()

	b.step("one of Azure's two instances is forgotten")
	half := strings.Replace(without(full, "azure-1"), "- name: azure-0\n  ipsec", "- name: azure-0\n  cloud: azure\n  ipsec", 1)
	b.ok(b.r.Apply(t.Context(), half))
	other := b.c.Azure.Config.Peerings[1].Outside.String()
	// Azure keeps initiating; strongSwan gives up at the first refusal, and may be admitted before
	// the tunnel is removed.
	b.until(2*time.Minute, func() error {
		_, err := b.c.Azure.Instances[1].IKE.(*peer.Charon).Swanctl(t.Context(), "--initiate", "--child", "tunnel", "--timeout", "5")
		if err == nil {
			return errors.New("the tunnel that is not in the document still comes up")
		}
		if !strings.Contains(b.cli("get", "tunnels"), "STRAY-ADDRESS") {
			return fmt.Errorf("no initiator outside the document was listed; the last call: %w", err)
		}
		return nil
	})
	shows("get tunnels", "STRAY-ADDRESS", other+" ", "dead", "second-instance", "azure-0")
	out, err := b.r.CLIInput(t.Context(), half, "validate", "-f", "-", "-o", "yaml")
	if err != nil || !strings.Contains(out, "notes:") || !strings.Contains(out, "tunnels[2]") {
		t.Errorf("validate: %v\n%s", err, out)
	}
	b.ok(b.r.Apply(t.Context(), full))
	b.up()
	if out := b.cli("get", "tunnels"); strings.Contains(out, other+" dead") || strings.Contains(out, "STRAY-ADDRESS") {
		t.Errorf("still called a stranger:\n%s", out)
	}

	b.step("a key with a letter too many")
	right := b.c.AWS.Config.Peerings[0].PSK
	_, err = b.r.CLIInput(t.Context(), right+"x", "secret", "set", "aws-0")
	b.ok(err)
	iface := b.tunnels()["aws-0"].GetInterface()
	// another key does not affect an established IKE SA
	b.ok(b.r.Apply(t.Context(), without(full, "aws-0")))
	b.present("aws-0", iface, false)
	b.ok(b.r.Apply(t.Context(), full))
	shows("describe tunnel aws-0", "reason: auth-refused", "AUTHENTICATION_FAILED", "field: tunnels[0].ipsec.psk", "isthmus secret set aws-0", "line: 6")
	_, err = b.r.CLIInput(t.Context(), right, "secret", "set", "aws-0")
	b.ok(err)
	b.up()
	if out := b.cli("describe", "tunnel", "aws-0"); strings.Contains(out, "explanation") {
		t.Errorf("a tunnel that is up is explained:\n%s", out)
	}
	b.run("no leak", (*bench).noLeak)
}
