package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// examples are the command lines that the help texts show, by the path of the command. Those of
// nouns come from the nouns.
var examples = map[string]string{
	"apply": `
isthmus apply -f hub.yaml
isthmus apply -f hub.yaml --confirm-within 2m   # reverts unless isthmus confirm follows
isthmus apply -f hub.yaml --expected-generation 7
ssh admin@laptop cat hub.yaml | isthmus apply -f -`,
	"authority renew": `
isthmus authority renew
isthmus authority renew --at-once   # shuts every client out
isthmus authority renew --node hub-1`,
	"client accept": `
isthmus client accept console.txt
aws ec2 get-console-output --instance-id i-0123456789abcdef0 --latest | isthmus client accept
isthmus client accept console.txt --address 203.0.113.9:7443`,
	"client issue": `
isthmus client issue alice --role operator -o alice.yaml
isthmus client issue grafana --role reader -o grafana.yaml --lifetime 720h
sudo isthmus client issue bob --role admin -o bob.yaml --endpoint 203.0.113.9:7443`,
	"client list": `
isthmus client list
isthmus client list alice -o wide
isthmus client list -o json`,
	"client renew": `
isthmus client renew
isthmus client renew --context ~/alice.yaml --keep-key
isthmus client renew --node hub-1`,
	"client request": `
isthmus client request --name alice > alice.csr
isthmus client request --name alice@example.net > alice.csr
isthmus client request --name ci > ci.csr`,
	"client revoke": `
isthmus client list alice
isthmus client revoke 5f0c3a9be1d24477a0c2b6f18d3e9a51
isthmus client revoke 5f0c3a9be1d24477a0c2b6f18d3e9a51 --node hub-1
isthmus client revoke 4a77e1c02b9f4d06b3ce581a6f90d2c3 --address 203.0.113.9:7443`,
	"cloud import": `
isthmus cloud import aws vpn-0123456789abcdef0.txt > tunnels.yaml
isthmus cloud import azure gateway.json connections.json --set-secrets
isthmus cloud import gcp gateways.yaml tunnels.yaml routers.yaml --for 203.0.113.9 --secrets-dir keys`,
	"cloud show": `
isthmus cloud show aws
isthmus cloud show azure -o yaml
isthmus cloud show gcp -o json`,
	"confirm": `
isthmus confirm 8
isthmus confirm 8 --node hub-1
isthmus confirm 8 --address 203.0.113.9:7443`,
	"context import": `
isthmus context import admin.yaml
isthmus context import admin.yaml --address 203.0.113.9:7443 --name hub-1
isthmus context import admin.yaml --overwrite`,
	"context list": `
isthmus context list
isthmus context list -o json
isthmus context list -o name`,
	"context rename": `
isthmus context rename 203.0.113.9 hub-1
isthmus context rename admin hub-1
isthmus context rename hub-1 hub-1-former`,
	"context show": `
isthmus context show
isthmus context show hub-1
isthmus context show --context alice.yaml`,
	"context use": `
isthmus context use hub-1
isthmus context use hub-2
isthmus context use 203.0.113.9`,
	"describe condition": `
isthmus describe condition PeerUnreachable
isthmus describe condition PoolDown
isthmus describe condition NotApplied`,
	"describe node": `
isthmus describe node
isthmus describe node hub-1
isthmus describe node -o json`,
	"diff": `
isthmus diff
isthmus diff 7
isthmus diff 7 9
isthmus diff -f hub.yaml`,
	"egress prove": `
isthmus egress prove --to 198.51.100.0/24
isthmus egress prove --to 198.51.100.0/24 --expect 203.0.113.9 --canary https://echo.partner.example/ip -o json > proof.json
isthmus egress prove --to 198.51.100.0/24 --canary https://echo.partner.example/ip --canary-from 10.1.255.254`,
	"egress verify": `
isthmus egress verify proof.json
isthmus egress verify proof.json --authority hub-1.pem
isthmus egress verify proof.json --context hub-1.yaml`,
	"flow end": `
isthmus flow end --from 10.1.0.7
isthmus flow end --from 10.1.0.0/24 --to 198.51.100.7 --protocol tcp --port 443
isthmus flow end --from 10.1.0.0/16 -o json`,
	"get audit": `
isthmus get audit
isthmus get audit --since 24h
isthmus get audit --who alice --method Apply -o wide`,
	"get events": `
isthmus get events
isthmus get events --since 1h --tunnel aws-0
isthmus get events --follow --severity warning
isthmus get events --type PoolAddressDown --type PoolDown -o json`,
	"get logs": `
isthmus get logs
isthmus get logs --since 1h --level warn
isthmus get logs --follow --room ipsec`,
	"get spec": `
isthmus get spec > hub.yaml
isthmus get spec --generation 7
isthmus get spec --effective
isthmus get spec -o json`,
	"get status": `
isthmus get status
isthmus get status -o wide
isthmus get status -A
isthmus get status -o json`,
	"nat who": `
isthmus nat who 203.0.113.9:21877 --at 5m
isthmus nat who 203.0.113.9:21877 --at 2026-11-20T12:01:05Z
isthmus nat who 203.0.113.9:21877 --at "2026-11-20 13:01:05" --within 30s
isthmus nat who 203.0.113.9:21877 --at 2026-11-20T12:01:05+01:00 --within 30s --protocol tcp --to 198.51.100.7
isthmus nat who 203.0.113.9 --to 198.51.100.7 --within 1m`,
	"peer disable": `
isthmus peer disable aws-0 -m "maintenance until 6 pm, NET-1234"
isthmus peer disable aws-0 aws-1 --plan
isthmus peer disable aws-0 --confirm-within 2m`,
	"peer enable": `
isthmus peer enable aws-0
isthmus peer enable aws-0 aws-1 --plan
isthmus peer enable aws-0 -m 'NET-1234: maintenance is over'`,
	"ping": `
isthmus ping 10.1.2.3
isthmus ping 169.254.10.1 --tunnel aws-0 -c 20 --interval 200ms
isthmus ping 10.1.2.3 --size 1372 --dont-fragment   # does a packet of 1,400 bytes fit?`,
	"capture": `
isthmus capture --tunnel aws-0 --host 10.1.2.3 | tcpdump -nr -
isthmus capture --tunnel aws-0 --protocol tcp --port 443 -c 10000 --duration 5m -f aws-0.pcap
isthmus capture --underlay --protocol esp --size 128 --duration 10s -f esp.pcap   # are encrypted packets coming?`,
	"plan": `
isthmus plan -f hub.yaml
isthmus plan -f hub.yaml -o json
isthmus get spec | sed s/aws-0/aws-1/ | isthmus plan -f -`,
	"policy delete": `
isthmus policy delete partner
isthmus policy delete partner web --plan
isthmus policy delete partner --confirm-within 2m`,
	"policy set": `
isthmus policy set -f partner.yaml
isthmus policy set -f partner.yaml --plan
isthmus policy set -f partner.yaml --confirm-within 2m`,
	"reset peer": `
isthmus reset peer aws-0
isthmus reset peer aws-0 --soft   # keeps the session
isthmus reset peer aws-0 --node hub-1`,
	"reset tunnel": `
isthmus reset tunnel aws-0
isthmus reset tunnel wg-branch
isthmus reset tunnel aws-0 --node hub-1`,
	"rollback": `
isthmus rollback
isthmus rollback --to 7
isthmus rollback --to 7 --expected-generation 9`,
	"secret delete": `
isthmus secret delete psk-aws-0
isthmus secret delete wg-branch
isthmus secret delete psk-aws-0 --node hub-1`,
	"secret list": `
isthmus secret list
isthmus secret list psk-aws-0 -o json
isthmus secret list -A`,
	"secret rollback": `
isthmus secret rollback psk-aws-0
isthmus secret rollback wg-branch
isthmus secret rollback psk-aws-0 --node hub-1`,
	"secret set": `
isthmus secret set psk-aws-0
isthmus secret set psk-site-0 --generate psk
isthmus secret set wg-branch --generate wireguard
isthmus secret set psk-aws-0 --from-file keys/psk-aws-0`,
	"secret show": `
isthmus secret show psk-aws-0
isthmus secret show psk-aws-0 wg-branch -o json
isthmus secret show wg-branch   # with its public key`,
	"support": `
isthmus support
isthmus support -f hub-1.tar.gz
isthmus support --node hub-1 --timeout 2m`,
	"system clean": `
sudo isthmus system clean --yes
sudo isthmus system clean --yes --quiet
sudo isthmus system clean --yes --timeout 2m`,
	"system poweroff": `
isthmus system poweroff
isthmus system poweroff --node hub-1
isthmus system poweroff --address 203.0.113.9:7443`,
	"system reboot": `
isthmus system reboot
isthmus system reboot --node hub-1
isthmus system reboot --address 203.0.113.9:7443`,
	"system rollback": `
isthmus system rollback
isthmus system rollback --node hub-1
isthmus system rollback --address 203.0.113.9:7443`,
	"system seal": `
isthmus system seal tpm2
isthmus system seal none
isthmus system seal tpm2 --abandon   # when the sealed secrets cannot be opened any more`,
	"system status": `
isthmus system status
isthmus system status -o json
isthmus system status --node hub-1`,
	"system unseal": `
isthmus system unseal
isthmus system unseal < recovery.txt
isthmus system unseal --node hub-1`,
	"system upgrade": `
isthmus system upgrade -f slot.img
isthmus system upgrade -f slot.img --later
isthmus system upgrade -f slot.img --signature slot.img.minisig --node hub-1`,
	"topology render": `
isthmus topology render -f network.yaml --for node/hub-1 | isthmus apply -f -
isthmus topology render -f network.yaml --for aws --as terraform > aws.tf
isthmus topology render -f network.yaml --for azure --part gateways --set azure-hub-0=20.0.0.4`,
	"topology show": `
isthmus topology show -f network.yaml
isthmus topology show -f network.yaml -o json
isthmus topology show -f network.yaml --set azure-hub-0=20.0.0.4`,
	"tunnel disable": `
isthmus tunnel disable aws-0 -m NET-1234
isthmus tunnel disable aws-0 aws-1 --plan
isthmus tunnel disable aws-0 --confirm-within 2m   # reverts unless isthmus confirm follows`,
	"tunnel enable": `
isthmus tunnel enable aws-0
isthmus tunnel enable aws-0 aws-1 --plan
isthmus tunnel enable aws-0 -m 'NET-1234: maintenance is over'`,
	"validate": `
isthmus validate -f hub.yaml
isthmus validate -f hub.yaml -o json
isthmus topology render -f network.yaml --for node/hub-1 | isthmus validate -f -`,
	"version": `
isthmus version
isthmus version --client -o json
isthmus version --node hub-1`,
}

// addExamples sets the examples of the commands below one.
func addExamples(parent *cobra.Command) {
	for _, c := range parent.Commands() {
		if text, ok := examples[strings.TrimPrefix(c.CommandPath(), "isthmus ")]; ok {
			c.Example = indented(strings.TrimPrefix(text, "\n"))
		}
		addExamples(c)
	}
}

// nounExamples returns examples of the verb get, describe or watch of a noun, with two names.
func nounExamples(verb, singular, plural string, names [2]string) string {
	switch verb {
	case "describe":
		return indented(fmt.Sprintf("isthmus describe %[1]s %[3]s\nisthmus describe %[2]s %[3]s %[4]s\nisthmus describe %[1]s %[3]s -o json", singular, plural, names[0], names[1]))
	case "watch":
		return indented(fmt.Sprintf("isthmus watch %[1]s\nisthmus watch %[1]s %[2]s %[3]s\nisthmus watch %[1]s -o json", plural, names[0], names[1]))
	}
	return indented(fmt.Sprintf("isthmus get %[2]s\nisthmus get %[2]s %[3]s %[4]s -o wide\nisthmus get %[1]s %[3]s -o json", singular, plural, names[0], names[1]))
}

func indented(text string) string { return "  " + strings.ReplaceAll(text, "\n", "\n  ") }
