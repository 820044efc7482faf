package rendered

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

// block is a block of Terraform with its values as text: a list has its items in lines, a reference
// its path.
type block struct {
	kind, name string
	args       map[string]string
	blocks     map[string][]block
}

// readBlocks parses Terraform and checks it against the schema.
func readBlocks(text string) ([]block, error) {
	f, diagnostics := hclsyntax.ParseConfig([]byte(text), "rendered.tf", hcl.InitialPos)
	if diagnostics.HasErrors() {
		return nil, diagnostics
	}
	var out []block
	seen := map[string]bool{}
	for _, b := range f.Body.(*hclsyntax.Body).Blocks {
		kind := strings.Join(append([]string{b.Type}, b.Labels[:len(b.Labels)-1]...), " ")
		s, ok := terraform[kind]
		if !ok {
			return nil, fmt.Errorf("line %d: %s is unknown", b.Range().Start.Line, kind)
		}
		name := b.Labels[len(b.Labels)-1]
		if seen[kind+" "+name] {
			return nil, fmt.Errorf("line %d: %s %s is there twice", b.Range().Start.Line, kind, name)
		}
		seen[kind+" "+name] = true
		read, err := readBody(kind+" "+name, b.Body, s)
		if err != nil {
			return nil, err
		}
		read.kind, read.name = kind, name
		out = append(out, read)
	}
	return out, references(f.Body.(*hclsyntax.Body), seen)
}

// references finds references to nothing.
func references(body *hclsyntax.Body, seen map[string]bool) error {
	for _, a := range body.Attributes {
		for _, v := range a.Expr.Variables() {
			p := strings.Split(path(v), ".")
			if len(p) == 1 || p[0] == "self" {
				continue // a type, or the object itself
			}
			kind, name := "resource "+p[0], p[1]
			switch p[0] {
			case "var":
				kind = "variable"
			case "data":
				kind, name = "data "+p[1], p[2]
			}
			if !seen[kind+" "+name] {
				return fmt.Errorf("line %d: %s refers to nothing", a.Range().Start.Line, path(v))
			}
		}
	}
	for _, b := range body.Blocks {
		if err := references(b.Body, seen); err != nil {
			return err
		}
	}
	return nil
}

func readBody(where string, body *hclsyntax.Body, s schema) (block, error) {
	out := block{args: map[string]string{}, blocks: map[string][]block{}}
	for name, a := range body.Attributes {
		v, err := value(a.Expr)
		if err != nil {
			return out, fmt.Errorf("%s.%s: %w", where, name, err)
		}
		out.args[name] = v
	}
	if err := s.check(where, slices.Sorted(maps.Keys(out.args))); err != nil {
		return out, err
	}
	for _, b := range body.Blocks {
		inner, ok := s.blocks[b.Type]
		if !ok {
			return out, fmt.Errorf("%s has no block %s", where, b.Type)
		}
		read, err := readBody(where+"."+b.Type, b.Body, inner)
		if err != nil {
			return out, err
		}
		out.blocks[b.Type] = append(out.blocks[b.Type], read)
	}
	return out, nil
}

// value returns an expression as text.
func value(e hclsyntax.Expression) (string, error) {
	if op, ok := e.(*hclsyntax.BinaryOpExpr); ok {
		right, err := value(op.RHS)
		return right, err // of a condition, the right operand
	}
	if t, ok := e.(*hclsyntax.ScopeTraversalExpr); ok {
		return path(t.Traversal), nil
	}
	v, diagnostics := e.Value(nil)
	if diagnostics.HasErrors() {
		return "", diagnostics
	}
	return scalar(v)
}

func scalar(v cty.Value) (string, error) {
	switch t := v.Type(); {
	case t == cty.String:
		return v.AsString(), nil
	case t == cty.Number:
		return v.AsBigFloat().Text('f', -1), nil
	case t == cty.Bool:
		return strconv.FormatBool(v.True()), nil
	case t.IsTupleType():
		var out []string
		for _, item := range v.AsValueSlice() {
			s, err := scalar(item)
			if err != nil {
				return "", err
			}
			out = append(out, s)
		}
		return strings.Join(out, "\n"), nil
	case t.IsObjectType():
		return "", nil // tags
	}
	return "", fmt.Errorf("is of type %s", v.Type().FriendlyName())
}

// path writes a reference as it stands in the text.
func path(t hcl.Traversal) string {
	var b strings.Builder
	for _, step := range t {
		switch s := step.(type) {
		case hcl.TraverseRoot:
			b.WriteString(s.Name)
		case hcl.TraverseAttr:
			b.WriteString("." + s.Name)
		case hcl.TraverseIndex:
			i, _ := s.Key.AsBigFloat().Int64()
			fmt.Fprintf(&b, "[%d]", i)
		}
	}
	return b.String()
}

// named returns the name of the object in a reference, whose last step is an attribute.
func named(reference string) string {
	p := strings.Split(strings.TrimPrefix(reference, "data."), ".")
	if len(p) != 3 {
		return reference
	}
	return p[1]
}

// variableName returns the name of the variable, as in the environment, if a value is one, else the
// value.
func variableName(text string) string {
	if name, ok := strings.CutPrefix(text, "var."); ok {
		return strings.ToUpper(name)
	}
	return text
}

var (
	tunnelAddress = regexp.MustCompile(`^aws_vpn_connection\.(\w+)\.tunnel([12])_address$`)
	publicAddress = regexp.MustCompile(`^azurerm_public_ip\.(\w+)_([01])\.ip_address$`)
	haInterface   = regexp.MustCompile(`^google_compute_ha_vpn_gateway\.(\w+)\.vpn_interfaces\[([01])\]\.ip_address$`)
)

func readTerraform(text string) (objects, error) {
	o := newObjects()
	blocks, err := readBlocks(text)
	if err != nil {
		return o, err
	}
	var wrong []error
	note := func(b block, err error) {
		if err != nil {
			wrong = append(wrong, fmt.Errorf("%s %s: %w", b.kind, b.name, err))
		}
	}
	for _, b := range blocks {
		a := b.args
		number := func(text string) uint32 {
			n, err := strconv.ParseUint(text, 10, 32)
			note(b, err)
			return uint32(n)
		}
		addr := func(text string) netip.Addr {
			v, err := netip.ParseAddr(text)
			note(b, err)
			return v
		}
		prefix := func(text string) netip.Prefix {
			v, err := netip.ParsePrefix(text)
			note(b, err)
			return v
		}
		suite := func(cipher, prf, group string) string {
			p, err := proposal(cipher, prf, group)
			note(b, err)
			return p
		}
		one := func(b block, name string) block {
			if len(b.blocks[name]) != 1 {
				note(b, fmt.Errorf("has %d blocks %s", len(b.blocks[name]), name))
				return block{}
			}
			return b.blocks[name][0]
		}
		switch b.kind {
		case "variable":
			if strings.HasPrefix(b.name, "psk_") && a["sensitive"] != "true" {
				note(b, errors.New("is not sensitive"))
			}
		case "output":
			for i, r := range []*regexp.Regexp{tunnelAddress, publicAddress, haInterface} {
				if m := r.FindStringSubmatch(a["value"]); m != nil {
					n, _ := strconv.Atoi(m[2])
					if i == 0 {
						n--
					}
					o.outside[fmt.Sprintf("%s %d", m[1], n)] = strings.ToUpper(b.name)
				}
			}
		case "data aws_ec2_transit_gateway", "data aws_vpn_gateway":
			o.awsGateways[b.name] = awsGateway{b.name, number(one(one(b, "lifecycle"), "postcondition").args["condition"])}
		case "resource aws_customer_gateway":
			o.customers[b.name] = peer{outside: variableName(a["ip_address"]), asn: number(a["bgp_asn"] + a["bgp_asn_extended"])}
		case "resource aws_vpn_connection":
			c := awsConnection{name: b.name, gateway: named(a["transit_gateway_id"] + a["vpn_gateway_id"]), customer: named(a["customer_gateway_id"])}
			for i := range c.tunnels {
				p := fmt.Sprintf("tunnel%d_", i+1)
				c.tunnels[i] = awsTunnel{
					cidr: prefix(a[p+"inside_cidr"]), psk: strings.TrimPrefix(a[p+"preshared_key"], "var."),
					ike:   suite(a[p+"phase1_encryption_algorithms"], a[p+"phase1_integrity_algorithms"], a[p+"phase1_dh_group_numbers"]),
					esp:   suite(a[p+"phase2_encryption_algorithms"], "", a[p+"phase2_dh_group_numbers"]),
					start: a[p+"startup_action"] == "start", outsideAt: fmt.Sprintf("%s %d", b.name, i),
					versions: a[p+"ike_versions"], dpdAction: a[p+"dpd_timeout_action"],
				}
			}
			o.connections = append(o.connections, c)
		case "resource azurerm_virtual_network_gateway":
			g := azureGateway{asn: number(one(b, "bgp_settings").args["asn"])}
			for i, p := range one(b, "bgp_settings").blocks["peering_addresses"] {
				if p.args["ip_configuration_name"] != b.blocks["ip_configuration"][i].args["name"] {
					note(b, fmt.Errorf("peering addresses of %q", p.args["ip_configuration_name"]))
				}
				for _, text := range strings.Fields(p.args["apipa_addresses"]) {
					g.custom[i] = append(g.custom[i], addr(text))
				}
			}
			o.azure[b.name] = g
		case "resource azurerm_local_network_gateway":
			s := one(b, "bgp_settings").args
			o.locals[b.name] = peer{variableName(a["gateway_address"]), number(s["asn"]), addr(s["bgp_peering_address"])}
		case "resource azurerm_virtual_network_gateway_connection":
			p, custom := one(b, "ipsec_policy").args, one(b, "custom_bgp_addresses").args
			if a["bgp_enabled"] != "true" {
				note(b, errors.New("has no BGP"))
			}
			o.azureTunnels = append(o.azureTunnels, azureConnection{
				name: b.name, gateway: named(a["virtual_network_gateway_id"]), local: named(a["local_network_gateway_id"]), psk: strings.TrimPrefix(a["shared_key"], "var."),
				ike: suite(p["ike_encryption"], p["ike_integrity"], p["dh_group"]), esp: suite(p["ipsec_encryption"], "", p["pfs_group"]),
				custom: [2]netip.Addr{addr(custom["primary"]), addr(custom["secondary"])},
			})
		case "resource google_compute_router":
			o.routers[b.name] = number(one(b, "bgp").args["asn"])
		case "resource google_compute_external_vpn_gateway":
			for i, x := range b.blocks["interface"] {
				if number(x.args["id"]) != uint32(i) {
					note(b, fmt.Errorf("interface %d is number %s", i, x.args["id"]))
				}
				o.externals[b.name] = append(o.externals[b.name], variableName(x.args["ip_address"]))
			}
			if want := map[int]string{1: "SINGLE_IP_INTERNALLY_REDUNDANT", 2: "TWO_IPS_REDUNDANCY", 4: "FOUR_IPS_REDUNDANCY"}[len(o.externals[b.name])]; a["redundancy_type"] != want {
				note(b, fmt.Errorf("%s with %d interfaces", a["redundancy_type"], len(o.externals[b.name])))
			}
		case "resource google_compute_vpn_tunnel":
			c := one(b, "cipher_suite")
			p1, p2 := one(c, "phase1").args, one(c, "phase2").args
			o.gcpTunnels = append(o.gcpTunnels, gcpTunnel{
				name: b.name, gateway: named(a["vpn_gateway"]), external: named(a["peer_external_gateway"]), router: named(a["router"]), psk: strings.TrimPrefix(a["shared_secret"], "var."),
				ike: suite(p1["encryption"], p1["prf"], p1["dh"]), esp: suite(p2["encryption"], "", p2["pfs"]),
				number: int(number(a["vpn_gateway_interface"])), peer: int(number(a["peer_external_gateway_interface"])),
			})
		case "resource google_compute_router_interface":
			o.interfaces[named(a["vpn_tunnel"])] = prefix(a["ip_range"])
		case "resource google_compute_router_peer":
			o.peers[named(a["interface"])] = peer{asn: number(a["peer_asn"]), inside: addr(a["peer_ip_address"])}
		}
	}
	return o, errors.Join(wrong...)
}
