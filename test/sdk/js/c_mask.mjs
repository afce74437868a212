// Program c: the server sees the masked Host and the public name beside it, for a request and for a WebSocket alike.
import { Sandbox } from '@e2b/code-interpreter'
import WebSocket from 'ws'
import { answering, assert, saw } from './check.mjs'

const server = `
import base64, hashlib, socketserver
class H(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        head, lines = {}, []
        while True:
            line = self.rfile.readline().decode().strip()
            if not line: break
            name, _, value = line.partition(':'); head[name.lower()] = value.strip()
        seen = ('host=%s forwarded=%s' % (head.get('host'), head.get('x-forwarded-host'))).encode()
        if 'sec-websocket-key' in head:
            accept = base64.b64encode(hashlib.sha1((head['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11').encode()).digest()).decode()
            self.wfile.write(('HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Accept: %s\\r\\n\\r\\n' % accept).encode())
            self.wfile.write(bytes([0x81, len(seen)]) + seen)
            self.rfile.read(1)
        else:
            self.wfile.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n' % len(seen) + seen)
class S(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
S(('0.0.0.0', 8080), H).serve_forever()
`

const sandbox = await Sandbox.create({ network: { maskRequestHost: 'localhost:${PORT}' } })
try {
  await sandbox.files.write('/home/user/server.py', server)
  await sandbox.commands.run('python /home/user/server.py', { background: true, timeoutMs: 0 })
  const host = sandbox.getHost(8080)
  const want = `host=localhost:8080 forwarded=${host}`

  assert.equal((await answering('https://' + host)).text, want)
  const message = await new Promise((resolve, reject) => {
    const socket = new WebSocket('wss://' + host)
    socket.on('message', (data) => { resolve(data.toString()); socket.close() })
    socket.on('error', reject)
  })
  assert.equal(message, want)
  saw('request and upgrade', message)
} finally {
  await sandbox.kill()
}
