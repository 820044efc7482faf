package condition

// The kinds of conditions.
var (
	AddressesRefused = &Kind{
		Name: "AddressesRefused", Of: "node", Severities: []Severity{Warning},
		Meaning: "A name has addresses that the node, a pool, the platform or a network inside needs. They are not allowed.",
		Cause:   "A mistake or an attack by the owner of the zone (DNS rebinding).",
		Remedy:  "Write those that are wanted in `destinations`.",
	}
	AnswersRefused = &Kind{
		Name: "AnswersRefused", Of: "node", Severities: []Severity{Warning},
		Meaning: "The DNS proxy refused answers with addresses that the node, a pool, the platform or a network inside needs.",
		Cause:   "A mistake or an attack by the owner of the zone (DNS rebinding).",
		Remedy:  "Write those that are wanted in `destinations`.",
	}
	AuditLogReplaced = &Kind{
		Name: "AuditLogReplaced", Of: "node", Severities: []Severity{Warning},
		Meaning: "The audit log was removed, renamed or replaced under the daemon within the last day, and was made again.",
		Cause:   "Another process rotates or removes it.",
		Remedy:  "Find that process; the daemon rotates the log by itself.",
	}
	AuthorityEnds = &Kind{
		Name: "AuthorityEnds", Of: "node", Severities: []Severity{Error},
		Meaning: "The certificate authority ends soon, and with it every certificate.",
		Cause:   "It is near the end of its life.",
		Remedy:  "See whether the clock is right, then `isthmus authority renew`.",
	}
	AuthorityRenewed = &Kind{
		Name: "AuthorityRenewed", Of: "node", Severities: []Severity{Warning},
		Meaning: "The former certificate authority is trusted for a while after it was renewed.",
		Cause:   "`isthmus authority renew` was called.",
		Remedy:  "Let each client run `isthmus client renew` until then, or issue new contexts.",
	}
	CharonUnfit = &Kind{
		Name: "CharonUnfit", Of: "node", Severities: []Severity{Warning},
		Meaning: "charon lacks a version, a plugin or an algorithm that tunnels need.",
		Cause:   "Another package of strongSwan is installed.",
		Remedy:  "Install what the message names, or use the isthmus image.",
	}
	CharonUnreachable = &Kind{
		Name: "CharonUnreachable", Of: "node", Severities: []Severity{Error},
		Meaning: "charon does not answer. Established tunnels go on until their keys expire.",
		Cause:   "charon has ended, or its vici socket is elsewhere.",
		Remedy:  "`systemctl status strongswan`, and start it.",
	}
	ClientExpires = &Kind{
		Name: "ClientExpires", Of: "node", Severities: []Severity{Error, Warning},
		Meaning: "The last certificate of an admin ends soon or has ended.",
		Cause:   "It is near the end of its life and was not renewed.",
		Remedy:  "Let that client run `isthmus client renew`, or issue another one as root on the node: `isthmus client issue`.",
	}
	ClientsExpire = &Kind{
		Name: "ClientsExpire", Of: "node", Severities: []Severity{Warning},
		Meaning: "Certificates of clients end soon.",
		Cause:   "They are near the end of their life and were not renewed.",
		Remedy:  "Let each client run `isthmus client renew`, or issue others: `isthmus client issue`.",
	}
	ClockWrong = &Kind{
		Name: "ClockWrong", Of: "node", Severities: []Severity{Error},
		Meaning: "The clock of the node cannot be right. Certificates are not issued or checked by it.",
		Cause:   "The machine started without time synchronisation.",
		Remedy:  "`timedatectl`; start an NTP client.",
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
		Meaning: "The DNS proxy does not listen at all of its places.",
		Cause:   "The address is not one of this node, or another program listens at port 53.",
		Remedy:  "`ss -lnup sport = 53` shows the program.",
	}
	DiskCopied = &Kind{
		Name: "DiskCopied", Of: "node", Severities: []Severity{Warning},
		Meaning: "Another disk has the same partitions as the disk that the node runs from.",
		Cause:   "A copy or a snapshot of the disk is attached.",
		Remedy:  "Detach it before the next start: the firmware chooses the disk.",
	}
	DocumentDamaged = &Kind{
		Name: "DocumentDamaged", Of: "node", Severities: []Severity{Error},
		Meaning: "The newest document on disk cannot be read, and the node carries out the one before.",
		Cause:   "The disk was full or failed, or the file was changed by hand.",
		Remedy:  "Apply the document again.",
	}
	DocumentNewer = &Kind{
		Name: "DocumentNewer", Of: "node", Severities: []Severity{Error},
		Meaning: "The newest document on disk was written by a newer version, and the node carries out the one before.",
		Cause:   "An older version was started on the state directory of a newer one.",
		Remedy:  "Start the newer version again, or apply the document with this one.",
	}
	DocumentUnusable = &Kind{
		Name: "DocumentUnusable", Of: "node", Severities: []Severity{Error},
		Meaning: "The stored document cannot be used by this version or on this kernel. What runs is left as it is.",
		Cause:   "The software, the kernel or a secret has changed since the document was accepted.",
		Remedy:  "Correct what the message names, and apply the document again.",
	}
	FactsOld = &Kind{
		Name: "FactsOld", Of: "node", Severities: []Severity{Warning},
		Meaning: "What the platform says of addresses could not be read for a while.",
		Cause:   "The metadata service does not answer.",
		Remedy:  "Check that the machine may reach its metadata service.",
	}
	FactsUnusable = &Kind{
		Name: "FactsUnusable", Of: "node", Severities: []Severity{Error},
		Meaning: "The document cannot be used with what the platform says now. What runs stays as it is.",
		Cause:   "An address or interface of the machine was taken away.",
		Remedy:  "Change the document, or give the machine what it names.",
	}
	FirstBootFailed = &Kind{
		Name: "FirstBootFailed", Of: "node", Severities: []Severity{Error},
		Meaning: "The first boot has failed.",
		Cause:   "The metadata service did not answer, or user-data could not be used.",
		Remedy:  "Correct what the message names and start again, or apply a document.",
	}
	FirstBootUnknown = &Kind{
		Name: "FirstBootUnknown", Of: "node", Severities: []Severity{Warning},
		Meaning: "It is not known whether user-data was used before. It is not used.",
		Cause:   "The note about it in the state directory is damaged.",
		Remedy:  "Apply a document.",
	}
	FirstBootWaiting = &Kind{
		Name: "FirstBootWaiting", Of: "node", Severities: []Severity{Warning},
		Meaning: "The first boot waits for the platform's user-data and is tried again.",
		Cause:   "The metadata service does not answer yet.",
		Remedy:  "Check that the machine may reach its metadata service, or apply a document.",
	}
	GenerationHeldBack = &Kind{
		Name: "GenerationHeldBack", Of: "node", Severities: []Severity{Error},
		Meaning: "The daemon died again and again while it carried out the present document, and carries out the one before, or nothing.",
		Cause:   "A fault of this software or of the kernel that the document brings out.",
		Remedy:  "Apply another document, or `isthmus rollback`. Report the fault with the daemon's log.",
	}
	GuardMissing = &Kind{
		Name: "GuardMissing", Of: "node", Severities: []Severity{Error},
		Meaning: "The rules that keep inside addresses in are not in the kernel. Nothing is forwarded until they are back.",
		Cause:   "Another process removed them.",
		Remedy:  "The node puts them back. `systemctl disable nftables` when its ruleset begins with `flush ruleset`.",
	}
	GuardWasMissing = &Kind{
		Name: "GuardWasMissing", Of: "node", Severities: []Severity{Warning},
		Meaning: "The rules were removed by another process within the last hour, and are back.",
		Cause:   "Another process flushed the ruleset.",
		Remedy:  "`systemctl disable nftables` when its ruleset begins with `flush ruleset`.",
	}
	InstanceChanged = &Kind{
		Name: "InstanceChanged", Of: "node", Severities: []Severity{Error},
		Meaning: "The state of this node was made on another instance.",
		Cause:   "The disk was copied or moved.",
		Remedy:  "If it is a copy, set new secrets on one of the two and `isthmus authority renew`.",
	}
	NameDiffers = &Kind{
		Name: "NameDiffers", Of: "node", Severities: []Severity{Warning},
		Meaning: "A name has other addresses in each answer, so that clients which ask another resolver get addresses that are not allowed.",
		Cause:   "The owner of the name spreads load by DNS.",
		Remedy:  "Have the clients ask `egress.dnsProxy` of this node.",
	}
	NameShared = &Kind{
		Name: "NameShared", Of: "node", Severities: []Severity{Warning},
		Meaning: "An address of a name is not a destination of its policy, since another policy decides about it.",
		Cause:   "Two names of different policies have the same address, or a static destination covers it.",
		Remedy:  "Give the policies different sources or ports, or write the address in `destinations`.",
	}
	NameTooLarge = &Kind{
		Name: "NameTooLarge", Of: "node", Severities: []Severity{Warning},
		Meaning: "An address of a name is not a destination, since the policies would make too many rules.",
		Cause:   "A policy has many sources or ports, and a name with many addresses.",
		Remedy:  "Give the policy fewer sources or ports, or names with fewer addresses.",
	}
	NameUnresolved = &Kind{
		Name: "NameUnresolved", Of: "node", Severities: []Severity{Warning},
		Meaning: "A domain name of a policy cannot be resolved. Its known addresses stay for `nameGrace`.",
		Cause:   "The resolvers do not answer, or the name does not exist.",
		Remedy:  "Check egress.resolvers, and the name.",
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
		Remedy:  "Correct what the message names; the next start tries again.",
	}
	NoUnderlayAddress = &Kind{
		Name: "NoUnderlayAddress", Of: "node", Severities: []Severity{Error},
		Meaning: "The underlay interface does not have the address that the document gives.",
		Cause:   "DHCP gave another address, or the document is of another machine.",
		Remedy:  "Compare `ip address` with underlay.address, or give `underlay.address: auto` on a platform that says the addresses.",
	}
	NotApplied = &Kind{
		Name: "NotApplied", Of: "node", Severities: []Severity{Error},
		Meaning: "An object of the document is not as wanted in the kernel, in charon or in BGP. The message names it.",
		Cause:   "The kernel or charon refused it, or something that it waits for is not there yet.",
		Remedy:  "Read the reason in the message. The node tries again, after 1 s at first and then after up to 1 min; `isthmus get status` shows when the condition ends.",
	}
	NotByUnderlay = &Kind{
		Name: "NotByUnderlay", Of: "node", Severities: []Severity{Error},
		Meaning: "The kernel sends to the peer of a tunnel by another interface than the underlay.",
		Cause:   "A route of the machine leads there, for instance that of a second network card.",
		Remedy:  "Add a route to the peer by the underlay, or change underlay.interface.",
	}
	NotConfirmed = &Kind{
		Name: "NotConfirmed", Of: "node", Severities: []Severity{Error, Warning},
		Meaning: "The present document goes back to the former one by itself unless it is confirmed. With severity error, going back has failed or could not be stored.",
		Cause:   "The document was applied with `--confirm-within`.",
		Remedy:  "`isthmus confirm GENERATION` keeps it. If going back failed, correct what the message names.",
	}
	NotReported = &Kind{
		Name: "NotReported", Of: "node", Severities: []Severity{Warning},
		Meaning: "The platform does not take the report that the node is ready, and may call its creation failed.",
		Cause:   "The platform's service does not answer or refuses.",
		Remedy:  "Check that the machine may reach it.",
	}
	PlacementsFull = &Kind{
		Name: "PlacementsFull", Of: "node", Severities: []Severity{Warning},
		Meaning: "As many sources are placed as there is room for. Others may find no port.",
		Cause:   "Very many sources use pools that are nearly full.",
		Remedy:  "Add addresses to the pools.",
	}
	PoolDegraded = &Kind{
		Name: "PoolDegraded", Of: "node", Severities: []Severity{Warning},
		Meaning: "Some addresses of a pool do not work. New flows get the others.",
		Cause:   "The probes of the address fail: the platform does not route it, or the targets are down.",
		Remedy:  "`isthmus get pools -o wide` shows which target fails since when.",
	}
	PoolDown = &Kind{
		Name: "PoolDown", Of: "node", Severities: []Severity{Error},
		Meaning: "No address of a pool works. All stay in use, and what the pool announces is withdrawn.",
		Cause:   "The way to the Internet is down, the public addresses are not associated, or all targets are down.",
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
		Remedy:  "Read the message; see `dmesg` for a lack of memory.",
	}
	PrefixesHeldBack = &Kind{
		Name: "PrefixesHeldBack", Of: "peer", Severities: []Severity{Warning},
		Meaning: "More prefixes are to be announced to a peer than `export.maxPrefixes`. The others are held back.",
		Cause:   "The peer's gateway takes only so many.",
		Remedy:  "Put aggregates into `announce`, or raise export.maxPrefixes to what the peer takes.",
	}
	ProxyDown = &Kind{
		Name: "ProxyDown", Of: "node", Severities: []Severity{Error, Warning},
		Meaning: "The proxy of a redirecting policy does not work. New flows are rejected, or with `whenDown: bypass` decided by other policies.",
		Cause:   "The proxy, or the way to it, is down.",
		Remedy:  "Repair the proxy; `isthmus get policies` shows whether it works again.",
	}
	PublicAddressChanged = &Kind{
		Name: "PublicAddressChanged", Of: "node", Severities: []Severity{Warning},
		Meaning: "The platform has given the machine another public address.",
		Cause:   "The address was released, or the machine was stopped and started.",
		Remedy:  "Tell the peers and partners that know the former one, or associate a fixed address.",
	}
	Quarantined = &Kind{
		Name: "Quarantined", Of: "peer", Severities: []Severity{Error},
		Meaning: "A BGP session is held down, since messages of its peer made the BGP process crash.",
		Cause:   "A fault of the BGP library that the peer's messages bring out.",
		Remedy:  "`isthmus reset peer NAME` ends it; report the fault.",
	}
	QueriesDropped = &Kind{
		Name: "QueriesDropped", Of: "node", Severities: []Severity{Warning},
		Meaning: "The DNS proxy has dropped queries within the last minute.",
		Cause:   "A client, or all of a tunnel, asks for more than the resolvers answer.",
		Remedy:  "Find the client with the address in the message.",
	}
	SafeStart = &Kind{
		Name: "SafeStart", Of: "node", Severities: []Severity{Error},
		Meaning: "The daemon carries nothing out; what runs stays as it is.",
		Cause:   "It was started with -safe.",
		Remedy:  "Apply a document or `isthmus rollback`, and then start the daemon without -safe.",
	}
	SealNotRenewed = &Kind{
		Name: "SealNotRenewed", Of: "node", Severities: []Severity{Warning},
		Meaning: "The secrets can be read, but the next start will need the recovery string again.",
		Cause:   "The TPM refused to seal the key.",
		Remedy:  "`isthmus system unseal` once more, or `isthmus system seal none`.",
	}
	Sealed = &Kind{
		Name: "Sealed", Of: "node", Severities: []Severity{Error},
		Meaning: "The seal of the secrets is closed: sealed secrets cannot be read, and what uses them waits.",
		Cause:   "The TPM is another one or its state has changed, as after a change of firmware or of the boot order.",
		Remedy:  "`isthmus system unseal` with the recovery string.",
	}
	SecretMissing = &Kind{
		Name: "SecretMissing", Of: "node", Severities: []Severity{Error},
		Meaning: "A secret that the document names is not stored. What uses it waits.",
		Cause:   "The document came with the machine's user-data, which has no secrets.",
		Remedy:  "`isthmus secret set NAME`.",
	}
	SecretsNotSealed = &Kind{
		Name: "SecretsNotSealed", Of: "node", Severities: []Severity{Warning},
		Meaning: "Some secrets are encrypted with the node key alone, which is on the same disk.",
		Cause:   "They were set while the seal was closed, or sealing them failed.",
		Remedy:  "`isthmus system unseal`, or `isthmus system seal tpm2 --abandon`.",
	}
	ServerCertificate = &Kind{
		Name: "ServerCertificate", Of: "node", Severities: []Severity{Error},
		Meaning: "The certificate of the API could not be renewed.",
		Cause:   "The authority or the state directory cannot be used.",
		Remedy:  "Restart isthmusd, or `isthmus authority renew`.",
	}
	SlotFailed = &Kind{
		Name: "SlotFailed", Of: "node", Severities: []Severity{Warning},
		Meaning: "A slot was given up, and the machine has returned to the other one.",
		Cause:   "The upgraded system did not come up, or lacked something that worked before.",
		Remedy:  "`isthmus system upgrade` with a slot that works.",
	}
	SlotOnTrial = &Kind{
		Name: "SlotOnTrial", Of: "node", Severities: []Severity{Warning},
		Meaning: "The slot that runs was installed by an upgrade and is not marked good yet.",
		Cause:   "The machine was started after `isthmus system upgrade`.",
		Remedy:  "Wait; the message says what is lacking. `isthmus system rollback` returns to the other slot now.",
	}
	StateFull = &Kind{
		Name: "StateFull", Of: "node", Severities: []Severity{Error, Warning},
		Meaning: "The file system of the state directory has little room left. With too little, changes are refused.",
		Cause:   "Logs or other files fill it.",
		Remedy:  "Remove what is not needed, or enlarge the file system. `egress.log.maxBytes` bounds the log of translations.",
	}
	StateNotWritable = &Kind{
		Name: "StateNotWritable", Of: "node", Severities: []Severity{Error},
		Meaning: "The state directory cannot be written, or its room cannot be read. What runs goes on; changes are refused.",
		Cause:   "The file system is read-only after an error, or the permissions of the directory have changed.",
		Remedy:  "See `dmesg` for errors of the disk, and mount the file system writable again.",
	}
	StateOlder = &Kind{
		Name: "StateOlder", Of: "node", Severities: []Severity{Error},
		Meaning: "The state directory is older than it was before.",
		Cause:   "A backup or a snapshot of the disk was put back.",
		Remedy:  "Look through `isthmus client list`, revoke again what was revoked since, set changed secrets again, and apply the document again.",
	}
	StoreDamaged = &Kind{
		Name: "StoreDamaged", Of: "node", Severities: []Severity{Warning},
		Meaning: "A file in the state directory cannot be read. The message names it.",
		Cause:   "The disk failed, or the file was changed by hand.",
		Remedy:  "Put the file back from a backup, or write what it holds again.",
	}
	StoreNewer = &Kind{
		Name: "StoreNewer", Of: "node", Severities: []Severity{Warning},
		Meaning: "A file in the state directory was written by a newer version and is not used.",
		Cause:   "An older version was started on the state directory of a newer one.",
		Remedy:  "Start the newer version again.",
	}
	TakeoverFailed = &Kind{
		Name: "TakeoverFailed", Of: "node", Severities: []Severity{Error},
		Meaning: "Taking the public addresses of the other node has failed. It is tried again.",
		Cause:   "The platform refused, or the program has no permission.",
		Remedy:  "Read the message; try the program by hand.",
	}
	TakeoverImpossible = &Kind{
		Name: "TakeoverImpossible", Of: "node", Severities: []Severity{Error},
		Meaning: "The document wants the addresses of another node to be taken over, and the daemon has no program that does it.",
		Cause:   "isthmusd was started without -mover.",
		Remedy:  "Start isthmusd with -mover.",
	}
	TookOver = &Kind{
		Name: "TookOver", Of: "node", Severities: []Severity{Warning},
		Meaning: "The other node did not answer, and this one has its public addresses.",
		Cause:   "The other node, or the way to it, is down.",
		Remedy:  "Repair the other node. The addresses stay here until the platform leads them to the other node again.",
	}
	TranslationLogDamaged = &Kind{
		Name: "TranslationLogDamaged", Of: "node", Severities: []Severity{Error},
		Meaning: "The log of translations is damaged or cannot be written.",
		Cause:   "The disk is full or fails.",
		Remedy:  "Make room; see the message for the file.",
	}
	TranslationLogIncomplete = &Kind{
		Name: "TranslationLogIncomplete", Of: "node", Severities: []Severity{Warning},
		Meaning: "Records of the log of translations were lost since the start.",
		Cause:   "The disk was too slow, or the kernel's events were too many.",
		Remedy:  "Use a faster disk, or shorten `egress.log.maxAge`.",
	}
	UnderlayMTU = &Kind{
		Name: "UnderlayMTU", Of: "node", Severities: []Severity{Error},
		Meaning: "The underlay interface has a smaller MTU than the document counts on: packets of tunnels are fragmented or lost.",
		Cause:   "The network gives the interface another MTU.",
		Remedy:  "Set underlay.mtu to the MTU of the interface.",
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
		Meaning: "A route is not installed, since it would take something from the node.",
		Cause:   "A peer announces a prefix that holds an address of the node, its platform, a gateway or a resolver.",
		Remedy:  "Have the peer announce more exact prefixes, or not this one.",
	}
)

// All are the kinds, by name.
var All = []*Kind{
	AddressesRefused,
	AnswersRefused,
	AuditLogReplaced,
	AuthorityEnds,
	AuthorityRenewed,
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
	FactsOld,
	FactsUnusable,
	FirstBootFailed,
	FirstBootUnknown,
	FirstBootWaiting,
	GenerationHeldBack,
	GuardMissing,
	GuardWasMissing,
	InstanceChanged,
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
	PlacementsFull,
	PoolDegraded,
	PoolDown,
	PortsExhausted,
	PortsLow,
	PortsUnknown,
	PrefixesHeldBack,
	ProxyDown,
	PublicAddressChanged,
	Quarantined,
	QueriesDropped,
	SafeStart,
	SealNotRenewed,
	Sealed,
	SecretMissing,
	SecretsNotSealed,
	ServerCertificate,
	SlotFailed,
	SlotOnTrial,
	StateFull,
	StateNotWritable,
	StateOlder,
	StoreDamaged,
	StoreNewer,
	TakeoverFailed,
	TakeoverImpossible,
	TookOver,
	TranslationLogDamaged,
	TranslationLogIncomplete,
	UnderlayMTU,
	UserDataIgnored,
	UserDataRefused,
	Withheld,
}
