package importer

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// readAzure reads the output of az network vnet-gateway, vpn-connection and local-gateway show, or
// for a hub vpn-gateway and vpn-site, which refer to each other by id; exported templates; and the
// site files of Virtual WAN.
func readAzure(r *Result, docs []document) {
	var a azureObjects
	for _, d := range docs {
		d.walk(func(n *node) bool {
			if strings.Contains(n.string("$schema"), "deploymentTemplate") {
				evaluate(n)
			}
			return len(n.keys) == 0
		})
		r.powerShell(d)
		found := false
		d.walk(func(n *node) bool {
			object := document{file: d.file, node: n}
			add := func(list *[]document, object document) {
				if r.room(object) {
					*list = append(*list, object)
				}
			}
			switch {
			case n.has("vpnSiteConfiguration"):
				r.azureSite(object)
			case n.has("ipAddress") && (n.has("publicIPAllocationMethod") || strings.Contains(strings.ToLower(n.string("id")), "/publicipaddresses/")):
				add(&a.addresses, object)
			case n.has("vpnSiteLinks"):
				for _, link := range n.get("vpnSiteLinks").items() {
					add(&a.sides, document{file: d.file, node: link})
				}
			case n.has("gatewayIpAddress") || n.has("localNetworkAddressSpace"):
				add(&a.sides, object)
			case n.has("vpnLinkConnections"):
				add(&a.hubConnections, object)
			case n.has("virtualNetworkGateway1") || n.has("connectionType"):
				add(&a.connections, object)
			case n.get("bgpSettings").has("bgpPeeringAddresses") || n.has("gatewayType"):
				add(&a.gateways, object)
				for _, c := range n.get("connections").items() { // of a hub's gateway
					add(&a.hubConnections, document{file: d.file, node: c})
				}
			default:
				return true
			}
			found = true
			return false
		})
		if !found {
			r.nothing(d, "gateway, connection, local gateway or VPN site")
		}
	}
	for _, c := range a.connections {
		r.azureConnection(c, a)
	}
	for _, c := range a.hubConnections {
		links := c.get("vpnLinkConnections").items()
		for _, link := range links {
			name := called(c.node)
			if len(links) > 1 {
				name += "-" + called(link)
			}
			r.azureLink(c, document{file: c.file, node: link}, name, a)
		}
	}
	if len(a.connections)+len(a.hubConnections) == 0 {
		for _, g := range a.gateways {
			r.missing(g, g.node, "the gateway %s has no connection among the files; give az network vpn-connection show (for a hub, az network vpn-gateway show) as well", called(g.node))
		}
		for _, s := range a.sides {
			r.missing(s, s.node, "%s is this node as Azure knows it, and no connection to it is among the files; give az network vpn-connection show as well", called(s.node))
		}
	}
}

// azureRefused notes why this node cannot use a connection, and reports whether there is such a
// reason.
func (r *Result) azureRefused(c document, name string) bool {
	if s := c.get("provisioningState"); strings.EqualFold(s.string(), "Deleting") {
		r.note(c, s, "%s: is being deleted; skipped", name)
		return true
	}
	if s := c.get("authenticationType"); strings.Contains(strings.ToLower(s.string()), "cert") {
		r.note(c, s, "%s: authenticates with certificates, and this node has pre-shared keys alone; make a new connection with a shared key", name)
		return true
	}
	// the second of a hub's
	for _, field := range []string{"connectionProtocol", "vpnConnectionProtocolType"} {
		if p := c.get(field); strings.EqualFold(p.string(), "IKEv1") {
			r.note(c, p, "%s: speaks IKEv1, which cannot be changed; make a new connection with IKEv2", name)
			return true
		}
	}
	for _, field := range []string{"usePolicyBasedTrafficSelectors", "trafficSelectorPolicies"} {
		if s := c.get(field); strings.EqualFold(s.string(), "true") || len(s.items()) > 0 {
			r.note(c, s, "%s: %s: a router has one pair of selectors for everything and cannot use others; turn them off", name, field)
			return true
		}
	}
	return false
}

// azureConnection makes the tunnels of a connection of a virtual network's gateway.
func (r *Result) azureConnection(c document, a azureObjects) {
	name := called(c.node)
	if kind := c.get("connectionType"); kind.string() != "" && !strings.EqualFold(kind.string(), "IPsec") {
		why := map[string]string{"vnet2vnet": " between two of Azure's own gateways", "expressroute": " over a private circuit, without a tunnel", "vpnclient": " for clients"}[norm(kind.string())]
		r.note(c, kind, "%s: is a connection of type %s%s; skipped", name, short(kind.string()), why)
		return
	}
	if r.azureRefused(c, name) {
		return
	}
	id := c.string("virtualNetworkGateway1", "id")
	g, ok := find(a.gateways, id)
	if !ok {
		r.missing(c, c.node, "%s: its gateway %s is not among the files; give az network vnet-gateway show as well", name, lastOf(id))
		return
	}
	if kind := g.get("vpnType"); strings.EqualFold(kind.string(), "PolicyBased") {
		r.note(g, kind, "%s: its gateway %s is policy based, which is IKEv1 with selectors instead of routes; make a route based one", name, called(g.node))
		return
	}
	side, known := find(a.sides, c.string("localNetworkGateway2", "id"))
	if !known {
		// the connection may contain it
		side = document{file: c.file, node: c.get("localNetworkGateway2")}
		if !side.has("gatewayIpAddress") {
			r.missing(c, c.node, "%s: its local network gateway %s is not among the files; give az network local-gateway show as well", name, lastOf(side.string("id")))
		}
	}
	if kind := g.get("gatewayType"); kind.string() != "" && !strings.EqualFold(kind.string(), "Vpn") {
		r.note(g, kind, "%s: its gateway %s is of type %s and not a VPN gateway; skipped", name, called(g.node), printable(short(kind.string())))
		return
	}
	if azureBasic(g) {
		r.note(g, g.get("sku", "name"), "%s: its gateway %s has SKU Basic, which has neither BGP nor custom policies, and whose default policy is weak (group 2, no PFS): write static routes, and keep the proposals; change to VpnGw1AZ or larger to have both", name, called(g.node))
	}
	r.azureTunnels(c, g, side, name, "azure", a)
}

// azureLink makes the tunnels of a link of a connection of a hub's gateway.
func (r *Result) azureLink(c, link document, name string, a azureObjects) {
	if r.azureRefused(link, name) {
		return
	}
	id, _, _ := strings.Cut(c.string("id"), "/vpnConnections/")
	g, ok := find(a.gateways, id)
	if !ok {
		r.missing(c, c.node, "%s: its gateway %s is not among the files; give az network vpn-gateway show as well", name, lastOf(id))
		return
	}
	side, known := find(a.sides, link.string("vpnSiteLink", "id"))
	if !known {
		side = document{file: c.file, node: &node{line: link.line}}
		r.missing(c, link.node, "%s: its site link %s is not among the files; give az network vpn-site show as well", name, lastOf(link.string("vpnSiteLink", "id")))
	}
	r.azureTunnels(link, g, side, name, "azure-vwan", a)
}

// azureTunnels makes one tunnel to each instance of a gateway.
func (r *Result) azureTunnels(c, g, side document, name, cloud string, a azureObjects) {
	bgp := strings.EqualFold(c.string("enableBgp"), "true")
	from, address, settings := "localNetworkGateway/", "gatewayIpAddress", "bgpSettings"
	if cloud == "azure-vwan" {
		from, address, settings = "vpnSiteLink/", "ipAddress", "bgpProperties"
	}
	public := r.address(side, side.get(address), from+address)
	ownASN := r.asn(side, side.get(settings, "asn"), from+settings+"/asn")
	own := r.address(side, side.get(settings, "bgpPeeringAddress"), from+settings+"/bgpPeeringAddress")
	how := "give az network vpn-connection shared-key show --connection-name " + name + " and store it, for every tunnel of the connection"
	if cloud == "azure-vwan" {
		how = "give the file for VPN sites that the hub makes, which has it"
	}
	psk := r.key(c, c.node, name, "azure", how, place{c.get("sharedKey"), "connection/sharedKey"})
	if f := side.get("fqdn"); !public.known() && f.string() != "" {
		r.note(side, f, "%s: Azure looks this node up by the name %s; see to it that the name has the address of the underlay", name, printable(short(f.string())))
	}
	if m := c.get("connectionMode"); strings.EqualFold(m.string(), "InitiatorOnly") {
		r.note(c, m, "%s: Azure opens the tunnel and answers no call (connectionMode); set ipsec.respondOnly: true", name)
	}
	private := strings.EqualFold(c.string("useLocalAzureIpAddress"), "true")
	if private {
		r.note(c, c.get("useLocalAzureIpAddress"), "%s: uses the private addresses of the gateway (useLocalAzureIpAddress), over ExpressRoute; the underlay must lead there", name)
	}
	var names []string
	instances := few(g.get("bgpSettings", "bgpPeeringAddresses").items(), maxInstances)
	if len(instances) == 0 {
		instances = few(g.get("ipConfigurations").items(), maxInstances)
	}
	if len(instances) == 0 {
		r.missing(g, g.node, "%s: its gateway %s has neither bgpSettings/bgpPeeringAddresses nor ipConfigurations, where the addresses of its instances are; give az network vnet-gateway show", name, called(g.node))
	}
	for i, in := range instances {
		remote := r.azureRemote(g, in, i, len(instances), name, private, a)
		if !remote.known() {
			continue
		}
		t := Tunnel{
			Name: nameOf(name, strconv.Itoa(i)), Cloud: cloud, Remote: remote, PSK: psk, RouterPublic: public, RouterASN: ownASN,
			About: fmt.Sprintf("%s, instance %d of %s", name, i, called(g.node)),
		}
		if len(instances) == 1 {
			t.Name = nameOf(name)
		}
		r.azurePolicy(c, g, name, i, &t)
		if bgp {
			t.ASN = r.asn(g, g.get("bgpSettings", "asn"), "gateway/bgpSettings/asn")
			peer := r.azurePeer(c, g, in, i, own)
			if own.known() && peer.known() {
				t.Inside = []Inside{{Value[netip.Prefix]{netip.PrefixFrom(own.Is, own.Is.BitLen()), own.From}, peer}}
			} else {
				r.note(c, c.node, "%s: no BGP addresses for the tunnel to %s; give `inside`, or the node allocates some that Azure does not know", name, remote.Is)
			}
		}
		if added, ok := r.add(c, c.node, t); ok {
			names = append(names, added)
		}
	}
	if !bgp && len(names) > 0 {
		r.note(c, c.node, "%s: has no BGP; write static routes for the VNet through %s", name, strings.Join(names, ", "))
	}
}

// azureRemote finds the address of an instance of a gateway: a gateway without BGP has only the
// names of its public addresses, and a private one is in the configuration of the instance.
func (r *Result) azureRemote(g document, in *node, i, instances int, name string, private bool, a azureObjects) (remote Value[netip.Addr]) {
	config := &node{line: in.line}
	configs := few(g.get("ipConfigurations").items(), maxInstances)
	for n, one := range configs {
		id := in.string("ipconfigurationId")
		if in == one || id != "" && strings.EqualFold(one.string("id"), id) || config.empty() && n == i && len(configs) == instances {
			config = one
		}
	}
	// A hub's instance lists its private address, too.
	for _, n := range in.get("tunnelIpAddresses").items() {
		if v := r.address(g, n, "gateway/tunnelIpAddresses"); v.known() && (!remote.known() || remote.Is.IsPrivate() != private) {
			remote = v
		}
	}
	if private {
		if remote.known() && remote.Is.IsPrivate() {
			return remote
		}
		if remote = r.address(g, config.get("privateIPAddress"), "gateway/ipConfigurations/privateIPAddress"); !remote.known() {
			r.note(g, in, "%s: instance %d of the gateway %s has no privateIPAddress; enable private addresses on the gateway, then give az network vnet-gateway show", name, i, called(g.node))
		}
		return remote
	}
	if remote.known() {
		return remote
	}
	id := config.string("publicIPAddress", "id")
	if id == "" {
		id = config.string("publicIPAddress")
	}
	if p, ok := find(a.addresses, id); ok && id != "" {
		remote = r.address(p, p.get("ipAddress"), "publicIPAddress/ipAddress")
	}
	switch {
	case remote.known():
	case id != "":
		r.missing(g, in, "%s: the address of instance %d of the gateway %s is not among the files; give az network public-ip show --name %s as well", name, i, called(g.node), lastOf(id))
	default:
		r.missing(g, in, "%s: an instance of the gateway %s has no tunnelIpAddresses, which templates leave out; give az network vnet-gateway show", name, called(g.node))
	}
	return remote
}

// azurePeer chooses the BGP address of an instance as Azure does: the one that the connection
// names; otherwise a custom one if ours is link-local; otherwise the default one.
func (r *Result) azurePeer(c, g document, in *node, i int, own Value[netip.Addr]) Value[netip.Addr] {
	// Terraform has them by instance.
	if n := c.get("instanceBgpAddresses", []string{"primary", "secondary"}[min(i, 1)]); n.string() != "" {
		return r.address(c, n, "connection/custom_bgp_addresses")
	}
	id := in.string("ipconfigurationId")
	// the second of a hub's
	for _, list := range []string{"gatewayCustomBgpIpAddresses", "vpnGatewayCustomBgpAddresses"} {
		for _, custom := range c.get(list).items() {
			if strings.EqualFold(custom.string("ipConfigurationId"), id) {
				return r.address(c, custom.get("customBgpIpAddress"), "connection/"+list)
			}
		}
	}
	lists := []string{"defaultBgpIpAddresses", "customBgpIpAddresses"}
	if own.Is.IsLinkLocalUnicast() {
		slices.Reverse(lists)
	}
	for _, list := range lists {
		if all := in.get(list).items(); len(all) > 0 {
			if list == "customBgpIpAddresses" && len(all) > 1 {
				r.note(c, c.node, "%s: does not name its custom BGP address, and the gateway has several; the first is taken, as Azure does", called(c.node))
			}
			return r.address(g, all[0], "gateway/"+list)
		}
	}
	all := g.get("bgpSettings", "bgpPeeringAddress")
	if parts := strings.Split(all.string(), ","); i < len(parts) && len(parts) < 9 {
		return r.address(g, &node{text: parts[i], line: all.line}, "gateway/bgpSettings/bgpPeeringAddress")
	}
	return Value[netip.Addr]{}
}

// azureSite reads one site of a Virtual WAN's file. It looks for the parts at any depth, because
// some files are nested.
func (r *Result) azureSite(d document) {
	site := d.get("vpnSiteConfiguration")
	name := site.string("Name")
	if name == "" {
		name = "site"
	}
	public := r.address(d, site.get("IPAddress"), "vpnSiteConfiguration/IPAddress")
	ownASN := r.asn(d, site.get("BgpSetting", "Asn"), "vpnSiteConfiguration/BgpSetting/Asn")
	own := r.address(d, site.get("BgpSetting", "BgpPeeringAddress"), "vpnSiteConfiguration/BgpSetting/BgpPeeringAddress")
	connections := d.get("vpnSiteConnections").items()
	if len(connections) == 0 {
		r.note(d, d.node, "%s: has no vpnSiteConnections; the site is connected to no hub", name)
	}
	for i, c := range connections {
		below := func(name string) *node {
			found := &node{line: c.line}
			c.walk(func(n *node) bool {
				if v := n.child(norm(name)); v != nil && found.empty() {
					found = v
				}
				return found.empty()
			})
			return found
		}
		hub, gateway, connection := below("hubConfiguration"), below("gatewayConfiguration"), below("connectionConfiguration")
		bgp := strings.EqualFold(connection.string("IsBgpEnabled"), "true")
		var spokes []netip.Prefix
		add := func(n *node) {
			if p, err := netip.ParsePrefix(n.string()); err == nil {
				spokes = append(spokes, p.Masked())
			} else if n.string() != "" {
				r.note(d, n, "%s: hubConfiguration: %q is not a prefix", name, short(n.string()))
			}
		}
		add(hub.get("AddressSpace"))
		for _, n := range hub.get("ConnectedSubnets").items() {
			add(n)
		}
		slices.SortFunc(spokes, netip.Prefix.Compare)
		spokes = slices.Compact(spokes)
		base := name
		if len(connections) > 1 {
			base = fmt.Sprintf("%s-%d", name, i)
		}
		r.note(d, c, "%s: a site file has no algorithms; the link needs a custom policy, as isthmus cloud show azure-vwan says", base)
		psk := r.key(d, c, base, "azure", "download the file again, whole, or set a new key at the connection", place{connection.get("PSK"), "connectionConfiguration/PSK"})
		var names []string
		for _, instance := range []string{"Instance0", "Instance1"} {
			remote := r.address(d, gateway.get("IpAddresses", instance), "gatewayConfiguration/IpAddresses/"+instance)
			if !remote.known() {
				r.note(d, gateway, "%s: gatewayConfiguration/IpAddresses has no %s; its tunnel is left out", base, instance)
				continue
			}
			t := Tunnel{
				Name: nameOf(base, instance[len("Instance"):]), Cloud: "azure-vwan", Remote: remote, RouterPublic: public, RouterASN: ownASN,
				About: fmt.Sprintf("site %s, %s of the hub in %s", name, instance, hub.string("Region")),
			}
			t.PSK = psk
			p := preset(t.Cloud)
			parameters := connection.get("IPsecParameters")
			t.ChildRekey = r.earlier(d, parameters, r.seconds(d, parameters.get("SALifeTimeInSeconds"), "IPsecParameters/SALifeTimeInSeconds"), p.ChildRekey.Is, 5*time.Minute)
			t.RekeyBytes = r.azureBytes(d, parameters.get("SADataSizeInKilobytes"), "IPsecParameters/SADataSizeInKilobytes", p.ChildRekeyBytes.Is)
			if bgp {
				t.ASN = r.asn(d, gateway.get("BgpSetting", "Asn"), "gatewayConfiguration/BgpSetting/Asn")
				peer := r.address(d, gateway.get("BgpSetting", "BgpPeeringAddresses", instance), "gatewayConfiguration/BgpSetting/BgpPeeringAddresses")
				if own.known() && peer.known() {
					t.Inside = []Inside{{Value[netip.Prefix]{netip.PrefixFrom(own.Is, own.Is.BitLen()), own.From}, peer}}
				} else {
					r.note(d, c, "%s: no BGP addresses for the tunnel to %s; give `inside`, or the node allocates some that Azure does not know", base, remote.Is)
				}
				if len(spokes) > 0 {
					t.Import = Value[[]netip.Prefix]{spokes, "hubConfiguration"}
				}
			}
			if added, ok := r.add(d, c, t); ok {
				names = append(names, added)
			}
		}
		if !bgp && len(names) > 0 {
			for _, p := range spokes {
				r.route(Value[netip.Prefix]{p, "hubConfiguration"}, names)
			}
		}
	}
}
