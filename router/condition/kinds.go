package condition

// The kinds of conditions.
var (
	AddressesRefused = &Kind{
		Name: "AddressesRefused", Of: "node", Severities: []Severity{Warning},
		Meaning: "A name resolves to addresses that the node, a pool, the platform or an inside network uses. They are not allowed.",
		Cause:   "A mistake or an attack by the owner of the zone (DNS rebinding).",
		Remedy:  "Write those that are wanted in `destinations`.",
	}
	AnswersRefused = &Kind{
		Name: "AnswersRefused", Of: "node", Severities: []Severity{Warning},
		Meaning: "The DNS proxy refused answers with addresses that the node, a pool, the platform or an inside network uses.",
		Cause:   "A mistake or an attack by the owner of the zone (DNS rebinding).",
		Remedy:  "Write those that are wanted in `destinations`.",
	}
	AuditLogReplaced = &Kind{
		Name: "AuditLogReplaced", Of: "node", Severities: []Severity{Warning},
		Meaning: "The audit log was removed, renamed or replaced while the daemon used it within the last day, and was created again.",
		Cause:   "Another process rotates or removes it.",
		Remedy:  "Find and stop that process; the daemon rotates the log by itself.",
	}
	AuthorityEnds = &Kind{
		Name: "AuthorityEnds", Of: "node", Severities: []Severity{Error},
		Meaning: "The certificate authority expires soon, and with it every certificate.",
		Cause:   "It is near the end of its lifetime.",
		Remedy:  "Check that the clock is right, then run `isthmus authority renew`.",
	}
	AuthorityRenewed = &Kind{
		Name: "AuthorityRenewed", Of: "node", Severities: []Severity{Warning},
		Meaning: "The certificate authority was renewed, and the former one is still trusted for a while.",
		Cause:   "`isthmus authority renew` was run.",
		Remedy:  "Until then run `isthmus client renew` on each client, or issue new contexts.",
	}
	BGPDown = &Kind{
		Name: "BGPDown", Of: "node", Severities: []Severity{Error},
		Meaning: "The BGP process does not run. Routes stay until the graceful restart time of the peers ends.",
		Cause:   "It crashed again and again, or it cannot be started.",
		Remedy:  "Read the log of isthmusd. If messages of one peer are the cause, its session is quarantined: report the defect.",
	}
	CharonUnfit = &Kind{
		Name: "CharonUnfit", Of: "node", Severities: []Severity{Warning},
		Meaning: "charon lacks a version, a plugin or an algorithm that tunnels need.",
		Cause:   "Another package of strongSwan is installed.",
		Remedy:  "Install the package that the message names, or use the isthmus image.",
	}
	CharonUnreachable = &Kind{
		Name: "CharonUnreachable", Of: "node", Severities: []Severity{Error},
		Meaning: "charon does not answer. Established tunnels continue until their keys expire.",
		Cause:   "charon has ended, or its vici socket is elsewhere.",
		Remedy:  "Check `systemctl status strongswan`, and start it.",
	}
	ClientExpires = &Kind{
		Name: "ClientExpires", Of: "node", Severities: []Severity{Error, Warning},
		Meaning: "The last certificate of an admin expires soon or has expired.",
		Cause:   "It is near the end of its lifetime and was not renewed.",
		Remedy:  "Run `isthmus client renew` on that client, or issue another one as root on the node: `isthmus client issue`.",
	}
	ClientsExpire = &Kind{
		Name: "ClientsExpire", Of: "node", Severities: []Severity{Warning},
		Meaning: "Certificates of clients expire soon.",
		Cause:   "They are near the end of their lifetime and were not renewed.",
		Remedy:  "Run `isthmus client renew` on each client, or issue others: `isthmus client issue`.",
	}
	ClockWrong = &Kind{
		Name: "ClockWrong", Of: "node", Severities: []Severity{Error},
		Meaning: "The clock of the node is wrong. The node does not issue or check certificates by it.",
		Cause:   "The machine started without time synchronisation.",
		Remedy:  "Check `timedatectl`, and start an NTP client.",
	}
	ConnectionTableFull = &Kind{
		Name: "ConnectionTableFull", Of: "node", Severities: []Severity{Error},
		Meaning: "The connection table is full. New flows are refused.",
		Cause:   "Many flows, or flows that do not end.",
		Remedy:  "Raise net.netfilter.nf_conntrack_max, or find the source with `conntrack -L`.",
	}
	ConnectionTableLow = &Kind{
		Name: "ConnectionTableLow", Of: "node", Severities: []Severity{Warning},
		Meaning: "The connection table is nearly full.",
		Cause:   "Many flows, or flows that do not end.",
		Remedy:  "Raise net.netfilter.nf_conntrack_max, or find the source with `conntrack -L`.",
	}
	DNSProxyDown = &Kind{
		Name: "DNSProxyDown", Of: "node", Severities: []Severity{Warning},
		Meaning: "The DNS proxy does not listen at all of its addresses.",
		Cause:   "The address is not one of this node, or another program listens at port 53.",
		Remedy:  "Find the program with `ss -lnup sport = 53`.",
	}
	DiskCopied = &Kind{
		Name: "DiskCopied", Of: "node", Severities: []Severity{Warning},
		Meaning: "Another disk has the same partitions as the disk that the node runs from.",
		Cause:   "A copy or a snapshot of the disk is attached.",
		Remedy:  "Detach it before the next boot: the firmware chooses the disk.",
	}
	DocumentDamaged = &Kind{
		Name: "DocumentDamaged", Of: "node", Severities: []Severity{Error},
		Meaning: "The newest document on disk cannot be read, and the node applies the previous one.",
		Cause:   "The disk was full or failed, or the file was changed by hand.",
		Remedy:  "Apply the document again.",
	}
	DocumentNewer = &Kind{
		Name: "DocumentNewer", Of: "node", Severities: []Severity{Error},
		Meaning: "The newest document on disk was written by a newer version, and the node applies the previous one.",
		Cause:   "An older version was started on the state directory of a newer one.",
		Remedy:  "Start the newer version again, or apply the document with this one.",
	}
	DocumentUnusable = &Kind{
		Name: "DocumentUnusable", Of: "node", Severities: []Severity{Error},
		Meaning: "The stored document cannot be used by this version or on this kernel. The present configuration stays.",
		Cause:   "The software, the kernel or a secret has changed since the document was accepted.",
		Remedy:  "Correct the cause in the message, and apply the document again.",
	}
	EventsNotStored = &Kind{
		Name: "EventsNotStored", Of: "node", Severities: []Severity{Warning},
		Meaning: "The node cannot write its event log. It keeps the last 10,000 events in memory, and writes them once it can.",
		Cause:   "The disk of the state directory is full, read-only or fails.",
		Remedy:  "Free disk space, or repair the file system; the message has the error.",
	}
	FactsOld = &Kind{
		Name: "FactsOld", Of: "node", Severities: []Severity{Warning},
		Meaning: "The node could not read the addresses from the platform for a while.",
		Cause:   "The metadata service does not answer.",
		Remedy:  "Check that the machine may reach its metadata service.",
	}
	FactsUnusable = &Kind{
		Name: "FactsUnusable", Of: "node", Severities: []Severity{Error},
		Meaning: "The document cannot be used with the platform's present answer. The present configuration stays.",
		Cause:   "An address or interface was removed from the machine.",
		Remedy:  "Change the document, or add the address or interface to the machine.",
	}
	FirstBootFailed = &Kind{
		Name: "FirstBootFailed", Of: "node", Severities: []Severity{Error},
		Meaning: "The first boot has failed.",
		Cause:   "The metadata service did not answer, or user-data could not be used.",
		Remedy:  "Correct the cause in the message and reboot, or apply a document.",
	}
	FirstBootUnknown = &Kind{
		Name: "FirstBootUnknown", Of: "node", Severities: []Severity{Warning},
		Meaning: "The node cannot tell whether it has used user-data before, and does not use it.",
		Cause:   "The record of it in the state directory is damaged.",
		Remedy:  "Apply a document.",
	}
	FirstBootWaiting = &Kind{
		Name: "FirstBootWaiting", Of: "node", Severities: []Severity{Warning},
		Meaning: "The first boot waits for the platform's user-data, and the node tries again.",
		Cause:   "The metadata service does not answer yet.",
		Remedy:  "Check that the machine may reach its metadata service, or apply a document.",
	}
	GenerationHeldBack = &Kind{
		Name: "GenerationHeldBack", Of: "node", Severities: []Severity{Error},
		Meaning: "The daemon died repeatedly while it applied the present document. It now applies the previous document, or none.",
		Cause:   "A defect of this software or of the kernel that the document triggers.",
		Remedy:  "Apply another document, or run `isthmus rollback`. Report the defect with the daemon's log.",
	}
	GuardMissing = &Kind{
		Name: "GuardMissing", Of: "node", Severities: []Severity{Error},
		Meaning: "The guard's rules are not in the kernel. The node forwards nothing until they are restored.",
		Cause:   "Another process removed them.",
		Remedy:  "The node restores them. Run `systemctl disable nftables` if its ruleset begins with `flush ruleset`.",
	}
	GuardWasMissing = &Kind{
		Name: "GuardWasMissing", Of: "node", Severities: []Severity{Warning},
		Meaning: "Another process removed the rules within the last hour, and the node has restored them.",
		Cause:   "Another process flushed the ruleset.",
		Remedy:  "Run `systemctl disable nftables` if its ruleset begins with `flush ruleset`.",
	}
	InstanceChanged = &Kind{
		Name: "InstanceChanged", Of: "node", Severities: []Severity{Error},
		Meaning: "The state directory of this node is from another instance.",
		Cause:   "The disk was copied or moved.",
		Remedy:  "If it is a copy, set new secrets on one of the two nodes and run `isthmus authority renew` there.",
	}
	InterfaceDown = &Kind{
		Name: "InterfaceDown", Of: "node", Severities: []Severity{Error},
		Meaning: "An interface that the document names is set down, or has no carrier.",
		Cause:   "An operator has set it down, or the other end of its link is gone.",
		Remedy:  "`ip link set NAME up`, or repair the link.",
	}
	InterfaceMissing = &Kind{
		Name: "InterfaceMissing", Of: "node", Severities: []Severity{Error},
		Meaning: "The machine does not have an interface that the document names.",
		Cause:   "The interface was removed from the machine, or has another name after a start.",
		Remedy:  "Compare the names in the document with `ip link`, and attach the interface again, or change the document.",
	}
	EventExportFailing = &Kind{
		Name: "EventExportFailing", Of: "node", Severities: []Severity{Warning},
		Meaning: "A receiver in `events.export` does not take the events of the node. The node keeps 10,000, and sends what is missing when the receiver is back.",
		Cause:   "The receiver or the path to it is down, it refuses the request, its name is not found, or it is an address that must not be one.",
		Remedy:  "The message has the answer of the receiver. `ip route get` shows the path to its address.",
	}
	LaneDead = &Kind{
		Name: "LaneDead", Of: "link", Severities: []Severity{Warning},
		Meaning: "A lane of a link does not carry packets in the direction that the message names. Routes do not use it, at both ends; its flows go over the other lanes, and the node tries to heal it.",
		Cause:   "A filter or a fault of the path of one UDP port, or the keys of one end.",
		Remedy:  "`isthmus describe link NAME` shows both directions with their times. Check that the UDP port of the lane is open both ways.",
	}
	LaneMTU = &Kind{
		Name: "LaneMTU", Of: "link", Severities: []Severity{Warning},
		Meaning: "Small packets arrive over a lane, and packets of the size of its MTU do not. Routes use the lane only if no other lane carries large packets.",
		Cause:   "The path between the nodes has a smaller MTU than the underlay.",
		Remedy:  "Set `mtu` of the link to the size that the message names, at both ends.",
	}
	LaneUnproved = &Kind{
		Name: "LaneUnproved", Of: "link", Severities: []Severity{Warning},
		Meaning: "A lane has not carried packets both ways since it was made, while other lanes of its link have. Routes do not use it.",
		Cause:   "The UDP port of the lane is closed, or the other node has fewer lanes.",
		Remedy:  "Give both nodes the same number of lanes, and open as many UDP ports, one after the other, as there are lanes.",
	}
	LinkDown = &Kind{
		Name: "LinkDown", Of: "link", Severities: []Severity{Error},
		Meaning: "No lane of a link carries packets both ways.",
		Cause:   "The other node, or the network between the nodes, is down.",
		Remedy:  "Look at the other node, and at the network between the underlays.",
	}
	LinkSilent = &Kind{
		Name: "LinkSilent", Of: "link", Severities: []Severity{Warning},
		Meaning: "The daemon of the other node does not prove the lanes of a link, while its kernel answers. Lanes stay in use.",
		Cause:   "The other daemon does not run, is of a version without links, or UDP port 862 is filtered inside the lanes.",
		Remedy:  "Look at the other node with `isthmus status`.",
	}
	MetricsDown = &Kind{
		Name: "MetricsDown", Of: "node", Severities: []Severity{Warning},
		Meaning: "The node does not serve its metrics at an address of `metrics.listen`. They are still at the port of the API.",
		Cause:   "The node does not have the address or the interface, or another program uses the port.",
		Remedy:  "Compare the address with `ip address`, and the port with `ss -ltnp`; stop the other program, or change `metrics`.",
	}
	NICAllowance = &Kind{
		Name: "NICAllowance", Of: "node", Severities: []Severity{Warning},
		Meaning: "Within the last two minutes the cloud held back or dropped packets of an interface, because they were beyond what it grants this type of machine.",
		Cause:   "More bandwidth (`bw_in`, `bw_out`), packets a second (`pps`), tracked connections (`conntrack`), or packets a second to the cloud's own services such as DNS (`linklocal`) than the instance type has.",
		Remedy:  "Choose a larger instance type, or spread the traffic over more nodes. For `linklocal`, cache the answers of DNS on the clients.",
	}
	NameDiffers = &Kind{
		Name: "NameDiffers", Of: "node", Severities: []Severity{Warning},
		Meaning: "A name has different addresses in each answer, so clients that ask another resolver get addresses that are not allowed.",
		Cause:   "The owner of the name spreads load by DNS.",
		Remedy:  "Configure the clients to use `egress.dnsProxy` of this node.",
	}
	NameShared = &Kind{
		Name: "NameShared", Of: "node", Severities: []Severity{Warning},
		Meaning: "An address of a name is not a destination of its policy, since another policy covers it.",
		Cause:   "Two names of different policies have the same address, or a static destination covers it.",
		Remedy:  "Give the policies different sources or ports, or write the address in `destinations`.",
	}
	NameTooLarge = &Kind{
		Name: "NameTooLarge", Of: "node", Severities: []Severity{Warning},
		Meaning: "An address of a name is not a destination, since the policies would need too many rules.",
		Cause:   "A policy has many sources or ports, and a name with many addresses.",
		Remedy:  "Give the policy fewer sources or ports, or names with fewer addresses.",
	}
	NameUnresolved = &Kind{
		Name: "NameUnresolved", Of: "node", Severities: []Severity{Warning},
		Meaning: "A domain name of a policy cannot be resolved. Its last addresses stay for `nameGrace`.",
		Cause:   "The resolvers do not answer, or the name does not exist.",
		Remedy:  "Check `egress.resolvers` and the name.",
	}
	NewNamesLimited = &Kind{
		Name: "NewNamesLimited", Of: "node", Severities: []Severity{Warning},
		Meaning: "The DNS proxy refuses answers that would give names more new addresses than one attachment may.",
		Cause:   "A client asks for very many different names of a wildcard.",
		Remedy:  "Find the client, or write prefixes in `destinations`.",
	}
	NoAuthority = &Kind{
		Name: "NoAuthority", Of: "node", Severities: []Severity{Error},
		Meaning: "Making the certificate authority and the first admin has failed.",
		Cause:   "The state directory cannot be written.",
		Remedy:  "Correct the cause in the message; the next start tries again.",
	}
	NoUnderlayAddress = &Kind{
		Name: "NoUnderlayAddress", Of: "node", Severities: []Severity{Error},
		Meaning: "The underlay interface does not have the address that the document gives.",
		Cause:   "DHCP assigned another address, or the document is for another machine.",
		Remedy:  "Compare `ip address` with `underlay.address`, or set `underlay.address: auto` on a platform that reports addresses.",
	}
	NotApplied = &Kind{
		Name: "NotApplied", Of: "node", Severities: []Severity{Error},
		Meaning: "An object in the kernel, in charon or in BGP differs from the document. The message names it.",
		Cause:   "The kernel or charon refused it, or it waits for another object.",
		Remedy:  "Read the reason in the message. The node tries again, after 1 s at first and then after up to 1 min. The condition ends when it succeeds: see `isthmus get status`.",
	}
	NotByUnderlay = &Kind{
		Name: "NotByUnderlay", Of: "node", Severities: []Severity{Error},
		Meaning: "The kernel sends packets to the peer of a tunnel through an interface other than the underlay.",
		Cause:   "A route of the machine leads there, for instance that of a second network card.",
		Remedy:  "Add a route to the peer through the underlay, or change `underlay.interface`.",
	}
	NotConfirmed = &Kind{
		Name: "NotConfirmed", Of: "node", Severities: []Severity{Error, Warning},
		Meaning: "The node reverts to the former document by itself unless the present one is confirmed. With severity error, going back has failed or could not be stored.",
		Cause:   "The document was applied with `--confirm-within`.",
		Remedy:  "Run `isthmus confirm GENERATION` to keep it. If going back failed, correct the cause in the message.",
	}
	NotReported = &Kind{
		Name: "NotReported", Of: "node", Severities: []Severity{Warning},
		Meaning: "The platform does not accept the report that the node is ready, and may treat its creation as failed.",
		Cause:   "The platform's service does not answer or refuses.",
		Remedy:  "Check that the machine can reach it.",
	}
	Outranked = &Kind{
		Name: "Outranked", Of: "route", Severities: []Severity{Warning},
		Meaning: "A route is in the kernel and is not used, because another route of the machine to the same prefix has a smaller metric.",
		Cause:   "The machine has that route itself, as a default route from DHCP has precedence over a learned one.",
		Remedy:  "None, if the route of the machine is meant. For forwarded packets and a default route set `underlay.defaultRoute: tunnels`. Otherwise remove the machine's route, or accept more specific prefixes from the peer.",
	}
	PlacementsFull = &Kind{
		Name: "PlacementsFull", Of: "node", Severities: []Severity{Warning},
		Meaning: "The table of placed sources is full. Further sources may find no port.",
		Cause:   "Very many sources use pools that are nearly full.",
		Remedy:  "Add addresses to the pools.",
	}
	PoolDegraded = &Kind{
		Name: "PoolDegraded", Of: "node", Severities: []Severity{Warning},
		Meaning: "Some addresses of a pool do not work. New flows use the others.",
		Cause:   "The probes of the address fail: the platform does not route it, or the targets are down.",
		Remedy:  "`isthmus get pools -o wide` shows which target fails since when.",
	}
	PoolDown = &Kind{
		Name: "PoolDown", Of: "node", Severities: []Severity{Error},
		Meaning: "No address of a pool works. All of them stay in use, and the prefixes that the pool announces are withdrawn.",
		Cause:   "The path to the Internet is down, the public addresses are not associated, or all targets are down.",
		Remedy:  "`isthmus get pools -o wide` shows which target fails since when.",
	}
	PortsExhausted = &Kind{
		Name: "PortsExhausted", Of: "node", Severities: []Severity{Error},
		Meaning: "A pool has no port left toward one service. New flows are refused.",
		Cause:   "Many flows from a pool go to one address and port of a partner.",
		Remedy:  "Add an address to the pool, or spread the clients over more destinations.",
	}
	PortsLow = &Kind{
		Name: "PortsLow", Of: "node", Severities: []Severity{Warning},
		Meaning: "An address has few ports left toward one service.",
		Cause:   "Many flows from a pool go to one address and port of a partner.",
		Remedy:  "Add an address to the pool, or spread the clients over more destinations.",
	}
	PortsUnknown = &Kind{
		Name: "PortsUnknown", Of: "node", Severities: []Severity{Warning},
		Meaning: "The ports in use cannot be counted. Placements stay as they are.",
		Cause:   "The connection table cannot be read.",
		Remedy:  "Read the message, and check `dmesg` for a lack of memory.",
	}
	PrefixLimit = &Kind{
		Name: "PrefixLimit", Of: "peer", Severities: []Severity{Error},
		Meaning: "A BGP session is held down, because the peer sent more prefixes than `maxPrefixes` allows.",
		Cause:   "A route leak at the peer, or a limit that is too low.",
		Remedy:  "Correct the announcements of the peer, or raise `maxPrefixes`; `isthmus reset peer NAME` opens the session at once.",
	}
	PrefixesHeldBack = &Kind{
		Name: "PrefixesHeldBack", Of: "peer", Severities: []Severity{Warning},
		Meaning: "More prefixes match the export policy of a peer than `export.maxPrefixes` allows. The excess is held back.",
		Cause:   "The peer's gateway accepts only a limited number of prefixes.",
		Remedy:  "Put aggregates into `announce`, or raise `export.maxPrefixes` to the limit of the peer.",
	}
	ProxyDown = &Kind{
		Name: "ProxyDown", Of: "node", Severities: []Severity{Error, Warning},
		Meaning: "The proxy of a redirect policy does not work. New flows are rejected, or with `whenDown: bypass` the other policies decide about them.",
		Cause:   "The proxy, or the path to it, is down.",
		Remedy:  "Repair the proxy; `isthmus get policies` shows whether it works again.",
	}
	PublicAddressChanged = &Kind{
		Name: "PublicAddressChanged", Of: "node", Severities: []Severity{Warning},
		Meaning: "The platform has assigned another public address to the machine.",
		Cause:   "The address was released, or the machine was stopped and started.",
		Remedy:  "Configure the new address at peers and partners, or associate a fixed address.",
	}
	Quarantined = &Kind{
		Name: "Quarantined", Of: "peer", Severities: []Severity{Error},
		Meaning: "A BGP session is held down, because messages of its peer crashed the BGP process.",
		Cause:   "A defect of the BGP library that the peer's messages trigger.",
		Remedy:  "Run `isthmus reset peer NAME` to end it, and report the defect.",
	}
	QueriesDropped = &Kind{
		Name: "QueriesDropped", Of: "node", Severities: []Severity{Warning},
		Meaning: "The DNS proxy has dropped queries within the last minute.",
		Cause:   "A client, or all clients of a tunnel together, ask more than the resolvers answer.",
		Remedy:  "Find the client with the address in the message.",
	}
	RoutesOutranked = &Kind{
		Name: "RoutesOutranked", Of: "node", Severities: []Severity{Warning},
		Meaning: "Routes of this node are in the kernel and are not used, because other routes of the machine to the same prefixes have smaller metrics.",
		Cause:   "The machine has these routes itself, as a default route from DHCP has precedence over a learned one.",
		Remedy:  "None, if the routes of the machine are meant. For forwarded packets and a default route set `underlay.defaultRoute: tunnels`. Otherwise remove the machine's routes, or accept more specific prefixes from the peer.",
	}
	RoutesWithheld = &Kind{
		Name: "RoutesWithheld", Of: "node", Severities: []Severity{Warning},
		Meaning: "Learned routes are not installed, because they would divert addresses that the node needs.",
		Cause:   "Peers announce prefixes that contain addresses of the node, its platform, a gateway or a resolver.",
		Remedy:  "`isthmus get routes` shows them; configure the peers to announce more specific prefixes, or not these.",
	}
	SafeStart = &Kind{
		Name: "SafeStart", Of: "node", Severities: []Severity{Error},
		Meaning: "The daemon applies nothing; the present configuration stays.",
		Cause:   "It was started with -safe.",
		Remedy:  "Apply a document or run `isthmus rollback`, and then start the daemon without -safe.",
	}
	SealNotRenewed = &Kind{
		Name: "SealNotRenewed", Of: "node", Severities: []Severity{Warning},
		Meaning: "The secrets can be read, but the next start will need the recovery string again.",
		Cause:   "The TPM refused to seal the key.",
		Remedy:  "Run `isthmus system unseal` once more, or `isthmus system seal none`.",
	}
	Sealed = &Kind{
		Name: "Sealed", Of: "node", Severities: []Severity{Error},
		Meaning: "The seal of the secrets is closed: sealed secrets cannot be read, and tunnels and peers that use them wait.",
		Cause:   "The TPM was replaced or its state has changed, as after a change of firmware or of the boot order.",
		Remedy:  "Run `isthmus system unseal` with the recovery string.",
	}
	SecretMissing = &Kind{
		Name: "SecretMissing", Of: "node", Severities: []Severity{Error},
		Meaning: "A secret that the document names is not stored. The tunnel or peer that uses it waits.",
		Cause:   "The document came with the machine's user-data, which has no secrets.",
		Remedy:  "Run `isthmus secret set NAME`.",
	}
	SecretsNotSealed = &Kind{
		Name: "SecretsNotSealed", Of: "node", Severities: []Severity{Warning},
		Meaning: "Some secrets are encrypted only with the node key, which is on the same disk.",
		Cause:   "They were set while the seal was closed, or sealing them failed.",
		Remedy:  "Run `isthmus system unseal`, or `isthmus system seal tpm2 --abandon`.",
	}
	ServerCertificate = &Kind{
		Name: "ServerCertificate", Of: "node", Severities: []Severity{Error},
		Meaning: "The certificate of the API could not be renewed.",
		Cause:   "The authority or the state directory cannot be used.",
		Remedy:  "Restart isthmusd, or run `isthmus authority renew`.",
	}
	SessionDown = &Kind{
		Name: "SessionDown", Of: "peer", Severities: []Severity{Error, Warning},
		Meaning: "A BGP session is not established. With severity warning, its tunnel is not up, or the session restarts gracefully and its routes stay.",
		Cause:   "The two sides have different ASNs, addresses or passwords, TCP port 179 is filtered, or the peer is down.",
		Remedy:  "Compare ASN, addresses and password with those of the peer; `isthmus describe peer NAME` shows the reasons of both sides.",
	}
	SlotFailed = &Kind{
		Name: "SlotFailed", Of: "node", Severities: []Severity{Warning},
		Meaning: "A slot was given up, and the machine has returned to the other one.",
		Cause:   "The upgraded system did not come up, or a function that worked before did not work.",
		Remedy:  "Run `isthmus system upgrade` with another slot.",
	}
	SlotOnTrial = &Kind{
		Name: "SlotOnTrial", Of: "node", Severities: []Severity{Warning},
		Meaning: "The running slot was installed by an upgrade and is not marked good yet.",
		Cause:   "The machine has booted after `isthmus system upgrade`.",
		Remedy:  "Wait; the message says what is still missing. `isthmus system rollback` returns to the other slot at once.",
	}
	StateFull = &Kind{
		Name: "StateFull", Of: "node", Severities: []Severity{Error, Warning},
		Meaning: "The file system of the state directory is nearly full. Below a minimum of free space, changes are refused.",
		Cause:   "Logs or other files fill it.",
		Remedy:  "Remove files that are not needed, or enlarge the file system. `egress.log.maxBytes` bounds the log of translations.",
	}
	StateNotWritable = &Kind{
		Name: "StateNotWritable", Of: "node", Severities: []Severity{Error},
		Meaning: "The state directory cannot be written, or its free space cannot be read. The present configuration stays; changes are refused.",
		Cause:   "The file system is read-only after an error, or the permissions of the directory have changed.",
		Remedy:  "Check `dmesg` for disk errors, and mount the file system writable again.",
	}
	StateOlder = &Kind{
		Name: "StateOlder", Of: "node", Severities: []Severity{Error},
		Meaning: "The state directory is older than at the node's last run.",
		Cause:   "A backup or a snapshot of the disk was restored.",
		Remedy:  "Check `isthmus client list`, revoke again the certificates that were revoked since, set changed secrets again, and apply the document again.",
	}
	StoreDamaged = &Kind{
		Name: "StoreDamaged", Of: "node", Severities: []Severity{Warning},
		Meaning: "A file in the state directory cannot be read. The message names it.",
		Cause:   "The disk failed, or the file was changed by hand.",
		Remedy:  "Restore the file from a backup, or set its contents again.",
	}
	StoreNewer = &Kind{
		Name: "StoreNewer", Of: "node", Severities: []Severity{Warning},
		Meaning: "A file in the state directory was written by a newer version and is not used.",
		Cause:   "An older version was started on the state directory of a newer one.",
		Remedy:  "Start the newer version again.",
	}
	TakeoverFailed = &Kind{
		Name: "TakeoverFailed", Of: "node", Severities: []Severity{Error},
		Meaning: "Taking over the public addresses of the other node has failed. The node tries again.",
		Cause:   "The platform refused, or the program has no permission.",
		Remedy:  "Read the message, and run the program by hand.",
	}
	TakeoverImpossible = &Kind{
		Name: "TakeoverImpossible", Of: "node", Severities: []Severity{Error},
		Meaning: "The document asks for the takeover of another node's addresses, and the daemon has no program for it.",
		Cause:   "isthmusd was started without -mover.",
		Remedy:  "Start isthmusd with -mover.",
	}
	TakeoverNotReady = &Kind{
		Name: "TakeoverNotReady", Of: "node", Severities: []Severity{Warning},
		Meaning: "The other node of the pair has not answered since this node began to watch it. When it fails now, this node waits until 30 s after that before it takes the addresses.",
		Cause:   "The other node, or each tunnel to it, has not been up since the start of this node.",
		Remedy:  "Look at the other node with `isthmus status`, and at the tunnels that lead to the addresses of `egress.takeover.watch`.",
	}
	TookOver = &Kind{
		Name: "TookOver", Of: "node", Severities: []Severity{Warning},
		Meaning: "The other node did not answer, and this node has taken over its public addresses.",
		Cause:   "The other node, or the path to it, is down.",
		Remedy:  "Repair the other node. The addresses stay on this node until the platform associates them with the other node again.",
	}
	TranslationLogDamaged = &Kind{
		Name: "TranslationLogDamaged", Of: "node", Severities: []Severity{Error},
		Meaning: "The log of translations is damaged or cannot be written.",
		Cause:   "The disk is full or fails.",
		Remedy:  "Free disk space; the message names the file.",
	}
	TranslationLogIncomplete = &Kind{
		Name: "TranslationLogIncomplete", Of: "node", Severities: []Severity{Warning},
		Meaning: "Records of the log of translations were lost since the start.",
		Cause:   "The disk was too slow, or the kernel's events were too many.",
		Remedy:  "Use a faster disk, or shorten `egress.log.maxAge`.",
	}
	TunnelDegraded = &Kind{
		Name: "TunnelDegraded", Of: "tunnel", Severities: []Severity{Warning},
		Meaning: "A tunnel is up, but will not stay up, or carries only a part of the traffic.",
		Cause:   "The peer refuses to renew the keys with the configured algorithms, or has narrowed the traffic selectors.",
		Remedy:  "`isthmus describe tunnel NAME` shows the field to change.",
	}
	TunnelDown = &Kind{
		Name: "TunnelDown", Of: "tunnel", Severities: []Severity{Error},
		Meaning: "A tunnel is not up.",
		Cause:   "The peer does not answer or refuses, or a setting of the two sides differs.",
		Remedy:  "`isthmus describe tunnel NAME` shows the reason and the field to change.",
	}
	TunnelSuspect = &Kind{
		Name: "TunnelSuspect", Of: "tunnel", Severities: []Severity{Error},
		Meaning: "The keys of a tunnel are negotiated, but data does not pass in both directions. Routes do not use the tunnel.",
		Cause:   "A firewall drops ESP (IP protocol 50) or the UDP packets that carry the data, or the peer has no route back.",
		Remedy:  "Let the packets pass, or set `udpEncapsulation: always` in an IPsec tunnel; `isthmus describe tunnel NAME` shows the direction.",
	}
	UnderlayMTU = &Kind{
		Name: "UnderlayMTU", Of: "node", Severities: []Severity{Error},
		Meaning: "The underlay interface has a smaller MTU than the document expects: packets of tunnels are fragmented or lost.",
		Cause:   "The network assigns another MTU to the interface.",
		Remedy:  "Set `underlay.mtu` to the MTU of the interface.",
	}
	UserDataIgnored = &Kind{
		Name: "UserDataIgnored", Of: "node", Severities: []Severity{Warning},
		Meaning: "User-data is not for isthmus and is ignored.",
		Cause:   "Its first line is not the header of isthmus.",
		Remedy:  "Begin user-data with the header that the message names, or apply a document.",
	}
	UserDataRefused = &Kind{
		Name: "UserDataRefused", Of: "node", Severities: []Severity{Error},
		Meaning: "User-data was refused, and nothing of it was used.",
		Cause:   "It has problems, which the message and the console list.",
		Remedy:  "Change user-data and boot again, or apply a document.",
	}
	Withheld = &Kind{
		Name: "Withheld", Of: "route", Severities: []Severity{Warning},
		Meaning: "A route is not installed, because it would divert addresses that the node needs.",
		Cause:   "A peer announces a prefix that contains an address of the node, its platform, a gateway or a resolver.",
		Remedy:  "Configure the peer to announce more specific prefixes, or not this one.",
	}
)

// All are the kinds, by name.
var All = []*Kind{
	AddressesRefused,
	AnswersRefused,
	AuditLogReplaced,
	AuthorityEnds,
	AuthorityRenewed,
	BGPDown,
	CharonUnfit,
	CharonUnreachable,
	ClientExpires,
	ClientsExpire,
	ClockWrong,
	ConnectionTableFull,
	ConnectionTableLow,
	DNSProxyDown,
	DiskCopied,
	DocumentDamaged,
	DocumentNewer,
	DocumentUnusable,
	EventExportFailing,
	EventsNotStored,
	FactsOld,
	FactsUnusable,
	FirstBootFailed,
	FirstBootUnknown,
	FirstBootWaiting,
	GenerationHeldBack,
	GuardMissing,
	GuardWasMissing,
	InstanceChanged,
	InterfaceDown,
	InterfaceMissing,
	LaneDead,
	LaneMTU,
	LaneUnproved,
	LinkDown,
	LinkSilent,
	MetricsDown,
	NICAllowance,
	NameDiffers,
	NameShared,
	NameTooLarge,
	NameUnresolved,
	NewNamesLimited,
	NoAuthority,
	NoUnderlayAddress,
	NotApplied,
	NotByUnderlay,
	NotConfirmed,
	NotReported,
	Outranked,
	PlacementsFull,
	PoolDegraded,
	PoolDown,
	PortsExhausted,
	PortsLow,
	PortsUnknown,
	PrefixLimit,
	PrefixesHeldBack,
	ProxyDown,
	PublicAddressChanged,
	Quarantined,
	QueriesDropped,
	RoutesOutranked,
	RoutesWithheld,
	SafeStart,
	SealNotRenewed,
	Sealed,
	SecretMissing,
	SecretsNotSealed,
	ServerCertificate,
	SessionDown,
	SlotFailed,
	SlotOnTrial,
	StateFull,
	StateNotWritable,
	StateOlder,
	StoreDamaged,
	StoreNewer,
	TakeoverFailed,
	TakeoverImpossible,
	TakeoverNotReady,
	TookOver,
	TranslationLogDamaged,
	TranslationLogIncomplete,
	TunnelDegraded,
	TunnelDown,
	TunnelSuspect,
	UnderlayMTU,
	UserDataIgnored,
	UserDataRefused,
	Withheld,
}
