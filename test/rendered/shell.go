package rendered

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// command is a command of a shell script. References to variables stay in its words as "$NAME".
type command struct {
	line    int
	assign  string // variable that keeps what it prints
	words   string // of the command itself, such as "aws ec2 create-customer-gateway"
	options map[string][]string
	stdin   string
}

// one returns the value of an option.
func (c command) one(option string) string { return strings.Join(c.options[option], " ") }

// arg returns the arguments after the words.
func (c command) arg() string { return c.one("NAME") }

var assignment = regexp.MustCompile(`^([A-Za-z_][A-Za-z0-9_]*)=\$\(`)

// readCommands parses the part of the shell's language that is rendered, and checks commands
// against their schema.
func readCommands(text string) ([]command, error) {
	var out []command
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		c := command{line: i + 1, options: map[string][]string{}}
		if strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#") {
			continue
		}
		for strings.HasSuffix(line, `\`) {
			i++
			line = strings.TrimSuffix(line, `\`) + lines[i]
		}
		if m := assignment.FindStringSubmatch(line); m != nil {
			c.assign, line = m[1], strings.TrimPrefix(line, m[0])
		}
		if before, end, ok := strings.Cut(line, " <<"); ok {
			for i++; i < len(lines) && lines[i] != end; i++ {
				c.stdin += lines[i] + "\n"
			}
			if i >= len(lines) {
				return nil, fmt.Errorf("line %d: input that does not end", c.line)
			}
			line = before
			if c.assign != "" {
				i++
				line += lines[i]
			}
		}
		if c.assign != "" {
			if comment := strings.Index(line, ") #"); comment >= 0 {
				line = line[:comment+1]
			}
			if !strings.HasSuffix(line, ")") {
				return nil, fmt.Errorf("line %d: a command that does not end", c.line)
			}
			line = strings.TrimSuffix(line, ")")
		}
		words, err := split(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", c.line, err)
		}
		n := len(words)
		for ; n > 0; n-- {
			c.words = strings.Join(words[:n], " ")
			if _, ok := commands[c.words]; ok {
				break
			}
		}
		if n == 0 {
			return nil, fmt.Errorf("line %d: %q is not a command that is known here", c.line, line)
		}
		option := "NAME"
		for _, w := range words[n:] {
			if strings.HasPrefix(w, "--") {
				option = w
				if c.options[w] == nil {
					c.options[w] = []string{}
				}
				continue
			}
			c.options[option] = append(c.options[option], w)
		}
		var given []string
		for name := range c.options {
			given = append(given, name)
		}
		slices.Sort(given)
		if err := commands[c.words].check(c.words, given); err != nil {
			return nil, fmt.Errorf("line %d: %w", c.line, err)
		}
		out = append(out, c)
	}
	return out, nil
}

// split makes words of a line, as a shell does.
func split(line string) (out []string, err error) {
	var b strings.Builder
	quote, open := rune(0), false
	runes := []rune(line)
	for i := 0; i < len(runes); i++ {
		switch r := runes[i]; {
		case quote == 0 && r == ' ':
			if open {
				out = append(out, b.String())
			}
			b.Reset()
			open = false
		case quote == 0 && (r == '\'' || r == '"'):
			quote, open = r, true
		case r == quote:
			quote = 0
		case quote == '"' && r == '\\':
			i++
			b.WriteRune(runes[i])
		case quote == 0 && strings.ContainsRune(";&|<>()`*", r):
			return nil, fmt.Errorf("%q outside of quotes", r)
		default:
			b.WriteRune(r)
			open = true
		}
	}
	if quote != 0 {
		return nil, errors.New("quotes that do not end")
	}
	if open {
		out = append(out, b.String())
	}
	return out, nil
}

// reference returns the name of the variable if a word is one, else the word.
func reference(word string) string { return strings.TrimPrefix(word, "$") }

var (
	byCIDR     = regexp.MustCompile(`\?TunnelInsideCidr=='([^']+)'`)
	numbered   = regexp.MustCompile(`\[([01])\]`)
	customBGP  = regexp.MustCompile(`^bgpSettings\.bgpPeeringAddresses\[([01])\]\.customBgpIpAddresses=(.*)$`)
	mustHold   = regexp.MustCompile(`^\$\{(\w+):\?`)
	ofInstance = regexp.MustCompile(`-ip([01])$`)
)

// awsOptions is the JSON of `aws ec2 create-vpn-connection --options`.
type awsOptions struct {
	StaticRoutesOnly bool
	TunnelOptions    []struct {
		TunnelInsideCidr, PreSharedKey, StartupAction, DPDTimeoutAction string
		IKEVersions                                                     []struct{ Value string }
		Phase1EncryptionAlgorithms, Phase1IntegrityAlgorithms           []struct{ Value string }
		Phase2EncryptionAlgorithms, Phase2IntegrityAlgorithms           []struct{ Value string }
		Phase1DHGroupNumbers, Phase2DHGroupNumbers                      []struct{ Value int }
	}
}

func readShell(text string) (objects, error) {
	o := newObjects()
	all, err := readCommands(text)
	if err != nil {
		return o, err
	}
	var wrong []error
	held := map[string]bool{} // variables that have a value
	ids, gatewayOf := map[string]string{}, map[string]string{}
	policies, customs := map[string][2]string{}, map[string][2]netip.Addr{}
	for _, c := range all {
		note := func(err error) {
			if err != nil {
				wrong = append(wrong, fmt.Errorf("line %d: %s: %w", c.line, c.words, err))
			}
		}
		for _, values := range c.options {
			for _, v := range values {
				for _, m := range regexp.MustCompile(`\$(\w+)`).FindAllStringSubmatch(v+c.stdin, -1) {
					if !held[m[1]] {
						note(fmt.Errorf("$%s has no value yet", m[1]))
					}
				}
			}
		}
		if c.assign != "" {
			held[c.assign] = true
		}
		number := func(text string) uint32 {
			n, err := strconv.ParseUint(text, 10, 32)
			note(err)
			return uint32(n)
		}
		addr := func(text string) netip.Addr {
			v, err := netip.ParseAddr(text)
			note(err)
			return v
		}
		suite := func(cipher, prf, group string) string {
			p, err := proposal(cipher, prf, group)
			note(err)
			return p
		}
		instance := func(r *regexp.Regexp, text string) string {
			m := r.FindStringSubmatch(text)
			if m == nil {
				note(fmt.Errorf("no number in %q", text))
				return ""
			}
			return m[1]
		}
		// key returns the variable whose value comes through standard input.
		key := func(asked bool, before string) string {
			text, ok := strings.CutPrefix(strings.TrimSuffix(c.stdin, "\n"), before)
			if text = strings.Trim(text, "'"); !asked || !ok || !strings.HasPrefix(text, "$") {
				note(fmt.Errorf("reads %q from standard input", c.stdin))
			}
			return reference(text)
		}
		name := c.one("--name")
		switch c.words {
		case ":":
			if m := mustHold.FindStringSubmatch(c.arg()); m != nil {
				held[m[1]] = true
			}
		case "aws ec2 describe-transit-gateways", "aws ec2 describe-vpn-gateways":
			ids[c.assign] = c.one("--transit-gateway-ids") + c.one("--vpn-gateway-ids")
		case "test":
			words := c.options["NAME"]
			id, ok := ids[reference(words[0])]
			if !ok || len(words) != 3 || words[1] != "=" {
				note(fmt.Errorf("compares %q", words))
				continue
			}
			o.awsGateways[id] = awsGateway{strings.TrimSuffix(reference(words[0]), "_asn"), number(words[2])}
		case "aws ec2 create-customer-gateway":
			o.customers[c.assign] = peer{outside: reference(c.one("--ip-address")), asn: number(c.one("--bgp-asn") + c.one("--bgp-asn-extended"))}
		case "aws ec2 create-vpn-connection":
			var options awsOptions
			d := json.NewDecoder(strings.NewReader(c.stdin))
			d.DisallowUnknownFields()
			if err := d.Decode(&options); err != nil || len(options.TunnelOptions) != 2 || c.one("--options") != "file:///dev/stdin" || options.StaticRoutesOnly {
				note(fmt.Errorf("options: %v", err))
				continue
			}
			v := awsConnection{name: strings.TrimSuffix(c.assign, "_vpn"), gateway: c.one("--transit-gateway-id") + c.one("--vpn-gateway-id"), customer: reference(c.one("--customer-gateway-id"))}
			for i, t := range options.TunnelOptions {
				first := func(list []struct{ Value string }) string {
					if len(list) != 1 {
						note(fmt.Errorf("tunnel %d: %d values where there must be one", i, len(list)))
						return ""
					}
					return list[0].Value
				}
				cidr, err := netip.ParsePrefix(t.TunnelInsideCidr)
				note(err)
				if len(t.Phase1DHGroupNumbers) != 1 || len(t.Phase2DHGroupNumbers) != 1 {
					note(fmt.Errorf("tunnel %d: groups %v and %v", i, t.Phase1DHGroupNumbers, t.Phase2DHGroupNumbers))
					continue
				}
				v.tunnels[i] = awsTunnel{
					cidr: cidr, psk: reference(t.PreSharedKey),
					ike:   suite(first(t.Phase1EncryptionAlgorithms), first(t.Phase1IntegrityAlgorithms), strconv.Itoa(t.Phase1DHGroupNumbers[0].Value)),
					esp:   suite(first(t.Phase2EncryptionAlgorithms), "", strconv.Itoa(t.Phase2DHGroupNumbers[0].Value)),
					start: t.StartupAction == "start", outsideAt: c.assign + " " + cidr.String(), versions: first(t.IKEVersions), dpdAction: t.DPDTimeoutAction,
				}
			}
			o.connections = append(o.connections, v)
		case "aws ec2 describe-vpn-connections":
			o.outside[reference(c.one("--vpn-connection-ids"))+" "+instance(byCIDR, c.one("--query"))] = c.assign
		case "az network vnet-gateway create":
			o.azure[name] = azureGateway{asn: number(c.one("--asn"))}
			for i, ip := range c.options["--public-ip-addresses"] {
				gatewayOf[ip] = name
				if instance(ofInstance, ip) != strconv.Itoa(i) {
					note(fmt.Errorf("public address %d is %s", i, ip))
				}
			}
		case "az network vnet-gateway update":
			g := o.azure[name]
			for _, set := range c.options["--set"] {
				m := customBGP.FindStringSubmatch(set)
				if m == nil {
					note(fmt.Errorf("sets %s", set))
					continue
				}
				i, _ := strconv.Atoi(m[1])
				note(json.Unmarshal([]byte(m[2]), &g.custom[i]))
			}
			o.azure[name] = g
		case "az network public-ip show":
			o.outside[underscores(gatewayOf[name])+" "+instance(ofInstance, name)] = c.assign
		case "az network vnet-gateway show":
			ids[c.assign] = instance(numbered, c.one("--query"))
		case "az network local-gateway create":
			o.locals[name] = peer{reference(c.one("--gateway-ip-address")), number(c.one("--asn")), addr(c.one("--bgp-peering-address"))}
		case "az network vpn-connection create":
			if c.options["--enable-bgp"] == nil {
				note(errors.New("has no BGP"))
			}
			o.azureTunnels = append(o.azureTunnels, azureConnection{name: name, gateway: c.one("--vnet-gateway1"), local: c.one("--local-gateway2"), psk: key(c.one("--shared-key") == "@-", "")})
		case "az network vpn-connection ipsec-policy add":
			policies[c.one("--connection-name")] = [2]string{
				suite(c.one("--ike-encryption"), c.one("--ike-integrity"), c.one("--dh-group")), suite(c.one("--ipsec-encryption"), "", c.one("--pfs-group")),
			}
		case "az network vpn-connection show":
			ids[c.assign] = name
		case "az resource update":
			list, ok := strings.CutPrefix(c.one("--set"), "properties.gatewayCustomBgpIpAddresses=")
			var items []struct {
				CustomBGPIPAddress netip.Addr `json:"customBgpIpAddress"`
				IPConfigurationID  string     `json:"ipConfigurationId"`
			}
			if err := json.Unmarshal([]byte(list), &items); !ok || err != nil || len(items) != 2 {
				note(fmt.Errorf("sets %s: %v", c.one("--set"), err))
				continue
			}
			var custom [2]netip.Addr
			for _, item := range items {
				i, err := strconv.Atoi(ids[reference(item.IPConfigurationID)])
				note(err)
				custom[i] = item.CustomBGPIPAddress
			}
			customs[ids[reference(c.one("--ids"))]] = custom
		case "gcloud compute vpn-gateways describe":
			o.outside[underscores(c.arg())+" "+instance(numbered, c.one("--format"))] = c.assign
		case "gcloud compute routers create":
			o.routers[c.arg()] = number(c.one("--asn"))
		case "gcloud compute external-vpn-gateways create":
			for i, item := range strings.Split(c.one("--interfaces"), ",") {
				n, a, _ := strings.Cut(item, "=")
				if n != strconv.Itoa(i) {
					note(fmt.Errorf("interface %d is number %s", i, n))
				}
				o.externals[c.arg()] = append(o.externals[c.arg()], reference(a))
			}
		case "gcloud compute vpn-tunnels create":
			o.gcpTunnels = append(o.gcpTunnels, gcpTunnel{
				name: c.arg(), gateway: c.one("--vpn-gateway"), external: c.one("--peer-external-gateway"), router: c.one("--router"), psk: key(c.one("--flags-file") == "/dev/stdin", "--shared-secret: "),
				ike:    suite(c.one("--phase1-encryption"), c.one("--phase1-prf"), c.one("--phase1-dh")),
				esp:    suite(c.one("--phase2-encryption"), "", c.one("--phase2-pfs")),
				number: int(number(c.one("--interface"))), peer: int(number(c.one("--peer-external-gateway-interface"))),
			})
		case "gcloud compute routers add-interface":
			p, err := netip.ParsePrefix(c.one("--ip-address") + "/" + c.one("--mask-length"))
			note(err)
			o.interfaces[c.one("--vpn-tunnel")] = p
		case "gcloud compute routers add-bgp-peer":
			o.peers[c.one("--interface")] = peer{asn: number(c.one("--peer-asn")), inside: addr(c.one("--peer-ip-address"))}
		}
	}
	for i := range o.azureTunnels {
		t := &o.azureTunnels[i]
		t.ike, t.esp, t.custom = policies[t.name][0], policies[t.name][1], customs[t.name]
	}
	return o, errors.Join(wrong...)
}
