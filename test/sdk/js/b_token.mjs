// Program b: a private sandbox is reached with its token only; a person's browser gets a page.
import https from 'node:https'
import { Sandbox } from '@e2b/code-interpreter'
import { answering, assert, get, saw } from './check.mjs'

/** Opens a page as a person's browser does. Not with fetch: that always says sec-fetch-mode: cors, as scripts do. */
function navigate(url) {
  const headers = { 'user-agent': 'Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0', accept: 'text/html', 'sec-fetch-mode': 'navigate' }
  return new Promise((resolve, reject) => {
    https.get(url, { headers }, async (answer) => {
      let text = ''
      for await (const chunk of answer) text += chunk
      resolve({ status: answer.statusCode, type: answer.headers['content-type'], text })
    }).on('error', reject)
  })
}

const sandbox = await Sandbox.create({ network: { allowPublicTraffic: false } })
try {
  assert.ok(sandbox.trafficAccessToken, 'a private sandbox has a traffic token')
  await sandbox.commands.run('python -m http.server 3000', { background: true, timeoutMs: 0 })
  const url = 'https://' + sandbox.getHost(3000)
  const right = { headers: { 'e2b-traffic-access-token': sandbox.trafficAccessToken } }

  assert.equal((await answering(url, right)).status, 200)
  const none = await get(url)
  assert.equal(none.status, 403)
  assert.match(JSON.parse(none.text).message, /'e2b-traffic-access-token' is missing/)
  saw('no token', none.text)

  const wrong = await get(url, { headers: { 'e2b-traffic-access-token': 'f'.repeat(64) } })
  assert.equal(wrong.status, 403)
  assert.match(JSON.parse(wrong.text).message, /is invalid/)
  saw('wrong token', wrong.text)

  const page = await navigate(url)
  assert.equal(page.status, 403)
  assert.match(page.type, /^text\/html/)
  assert.match(page.text, /Missing Traffic Access Token/)
  saw('browser', page.type)

  // The token is ours: code in the sandbox must never see it.
  await sandbox.files.write('/tmp/echo.py', [
    'from http.server import BaseHTTPRequestHandler, HTTPServer',
    'class H(BaseHTTPRequestHandler):',
    '    def do_GET(self):',
    '        body = str(self.headers).encode()',
    '        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)',
    'HTTPServer(("127.0.0.1", 3001), H).serve_forever()',
  ].join('\n'))
  await sandbox.commands.run('python /tmp/echo.py', { background: true, timeoutMs: 0 })
  const seen = await answering('https://' + sandbox.getHost(3001), right)
  assert.equal(seen.status, 200)
  assert.ok(!seen.text.toLowerCase().includes('e2b-traffic-access-token'), 'the token reached the sandbox')

  const again = await Sandbox.connect(sandbox.sandboxId)
  assert.equal(again.trafficAccessToken, sandbox.trafficAccessToken)
  saw('with token', '200, and connect() returns the same token')
} finally {
  await sandbox.kill()
}
