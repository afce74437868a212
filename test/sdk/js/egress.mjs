// Asks from inside a sandbox what it can reach, over TCP and over UDP. The hosts are the laboratory's.
import { patience } from './check.mjs'

const udpProbe = `
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2)
try:
    s.connect((sys.argv[1], int(sys.argv[2]))); s.send(b'ping'); sys.exit(0 if s.recv(64) == b'ping' else 3)
except OSError as e:
    print(e); sys.exit(1)
`

/** Returns for each address whether a TCP (HTTP) and a UDP (echo) exchange succeeded: {'1.1.1.1': 'tcp udp', …}. */
export async function reach(sandbox, addresses) {
  await sandbox.files.write('/tmp/udp.py', udpProbe)
  const script = addresses.map((a) => [
    `printf '%s ' ${a}`,
    `curl -s -o /dev/null --connect-timeout 3 --max-time 5 http://${a}:${process.env.LAB_HTTP_PORT}/ && printf 'tcp '`,
    `python /tmp/udp.py ${a} ${process.env.LAB_UDP_PORT} >/dev/null && printf 'udp'`,
    'echo',
  ].join('\n')).join('\n')
  const { stdout } = await sandbox.commands.run(script + '\ntrue', { timeoutMs: 60_000 * patience })
  return Object.fromEntries(stdout.trim().split('\n').map((line) => {
    const [address, ...how] = line.trim().split(/\s+/)
    return [address, how.join(' ')]
  }))
}
