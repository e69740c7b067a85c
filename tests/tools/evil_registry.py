#!/usr/bin/env python3
"""evil_registry.py - a read-mostly OCI registry over one OCI layout that misbehaves on request.  stdlib only.

  evil_registry.py LAYOUT [--host 127.0.0.1] [--port 5000] [--blob-port 5001] [-f FAULT]... [--tls-cert C --tls-key K]
                   [--bomb-gib N] [--quiet] [--portfile F]
  evil_registry.py --list-faults

Every repository name maps to LAYOUT.  Tags = index.json's org.opencontainers.image.ref.name; digests = blobs/sha256.
Synthetic tags: evil-bomb (one gzip layer of N GiB zeros, ~1:1000), evil-big (valid manifest padded by bigmanifest's mb).

FAULT = name[:key=val[,key=val...]].  Selectors every fault takes:
  on=blob|manifest|tag|token|referrers|storage|all (default depends)  match=SUBSTR (of path)  method=GET|HEAD
  first=N (only the first N matching requests)  skip=N (leave the first N alone)  every=N (each Nth)  prob=P
  minrange=1 (only requests with a Range header)   maxkey: seen per path with perpath=1 (first/skip/every counted per path)
Faults:
  norange                 200 + whole body although Range was asked
  range416                416 to every Range
  range:mode=shift|total|missing|short|long|multipart|star   206 with: Content-Range shifted by 1 / wrong total / no
                          Content-Range / one byte less than asked / one byte more / multipart/byteranges / total '*'
  rangedata:shift=N       206 with right headers, bytes taken N further on (silent wrong data)
  truncate:at=N           Content-Length right, connection closed (FIN) after N body bytes
  eoftrunc:at=N           no Content-Length, close-delimited body ends after N bytes (looks complete)
  chunktrunc:at=N         chunked body, ends without last chunk
  reset:at=N              TCP RST after N body bytes        hdrreset        RST before any header
  slow:bps=N,chunk=M      slow body                          stall:at=N,secs=S   pause inside the body
  hdrstall:secs=S         pause before headers               drip:secs=S     headers one byte each S seconds
  status:code=N,retry_after=S,html=1    error status (503, 404, 403, 429...), optional Retry-After (secs; date=1: HTTP date)
  burst:code=500,len=N,gap=M            N failures, then M good ones, and again
  auth:every=N,ttl=S,user=U,pass=P,noexp=1,field=access_token,badtoken=1
                          401 + Bearer challenge; a token is good for N requests / S seconds; token endpoint wants Basic
                          when user is given; badtoken: tokens are never accepted; field: access_token instead of token
  redirect:code=307,ttl=S,uses=N,strict=1,loop=1,relative=1,cross=1
                          blob GET/HEAD -> signed URL on the blob port; expires after S s / N uses (403 afterwards);
                          strict: 400 if an Authorization header arrives there (like S3); loop: redirects to itself for ever
                          cross: Location uses host name 'localhost' rather than 127.0.0.1
  corrupt:at=N,len=L      bytes N.. of the blob are flipped (also in ranges covering them)
  badmanifest:mode=space|swap|type|schema|notjson|digesthdr   body changed but valid JSON (digest wrong) / another manifest of
                          the layout / Content-Type wrong / schemaVersion 1 / garbage / Docker-Content-Digest header lies
  bigmanifest:mb=N        by tag: the manifest carries N MiB of annotation (digest header is right)
  nohead:code=405         HEAD refused                       noreferrers     referrers API 404 (default: implemented)
  nolength                close-delimited body               chunked         chunked body
  gzenc                   Content-Encoding: gzip label on an already gzip blob       wronglength:add=N  Content-Length off by N
  silentclose             closes keep-alive connections after each response without saying so
  emptybody               200 with Content-Length 0          html            200 text/html captive portal page
Control (any time):  GET /_evil/log  GET /_evil/stats  PUT /_evil/faults (JSON list of FAULT strings)  POST /_evil/reset
  stats: requests by kind, ranges, body bytes sent per path, faults fired (proves that a fault was really met)."""
import argparse, base64, email.utils, hashlib, hmac, io, json, os, random, re, socket, ssl, struct, sys, threading, time, zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit, parse_qs, quote

SECRET = os.urandom(16)
LOCK = threading.RLock()
DEFON = {'norange': 'blob', 'range416': 'blob', 'range': 'blob', 'rangedata': 'blob', 'auth': 'all', 'redirect': 'blob',
         'badmanifest': 'manifest', 'bigmanifest': 'manifest', 'nohead': 'all', 'noreferrers': 'referrers', 'status': 'all',
         'burst': 'all', 'silentclose': 'all', 'hdrreset': 'all', 'hdrstall': 'all', 'drip': 'all', 'html': 'all', 'emptybody': 'all'}

# Every fault, those with modes once for each of them: what a table of tests must have.
FAULTS = [
    'norange', 'range416', *('range:mode=' + m for m in 'shift total missing short long multipart star'.split()), 'rangedata',
    'truncate', 'eoftrunc', 'chunktrunc', 'reset', 'hdrreset', 'slow', 'stall', 'hdrstall', 'drip', 'status', 'burst', 'auth',
    'redirect', 'corrupt', *('badmanifest:mode=' + m for m in 'space swap type schema notjson digesthdr'.split()), 'bigmanifest',
    'nohead', 'noreferrers', 'nolength', 'chunked', 'gzenc', 'wronglength', 'silentclose', 'emptybody', 'html']
NAMES = {f.partition(':')[0] for f in FAULTS}

class Fault:
    def __init__(s, spec):
        s.spec = spec
        s.name, _, r = spec.partition(':')
        if s.name not in NAMES: raise ValueError('no fault is called %r' % s.name)
        s.kv = dict(p.partition('=')[::2] for p in r.split(',') if p)
        s.n = {}
        s.fired = 0
    def i(s, k, d=0):
        return int(float(s.kv.get(k, d)))
    def f(s, k, d=0.0):
        return float(s.kv.get(k, d))
    def hit(s, kind, method, path, rng):
        on = s.kv.get('on', DEFON.get(s.name, 'blob'))
        if on == 'manifest' and kind == 'tag': kind = 'manifest'
        if on == 'blob' and kind == 'storage' and s.name not in ('redirect',): kind = 'blob'
        if kind != on and not (on == 'all' and kind in ('blob', 'manifest', 'tag', 'referrers', 'ping')): return False
        if 'match' in s.kv and s.kv['match'] not in path: return False
        if 'method' in s.kv and s.kv['method'] != method: return False
        if s.kv.get('minrange') and not rng: return False
        with LOCK:
            key = path if s.kv.get('perpath') else ''
            s.n[key] = s.n.get(key, 0) + 1
            n = s.n[key]
            if n <= s.i('skip'): return False
            n -= s.i('skip')
            if 'first' in s.kv and n > s.i('first'): return False
            if s.name != 'auth' and 'every' in s.kv and n % s.i('every'): return False
            if 'prob' in s.kv and random.random() > s.f('prob'): return False
            if s.name == 'burst' and (n - 1) % (s.i('len', 3) + s.i('gap', 3)) >= s.i('len', 3): return False
            s.fired += 1
        return True

class World:
    def __init__(w, a):
        w.a, w.dir = a, a.layout
        w.faults = [Fault(x) for x in a.fault]
        w.extra = {}            # digest -> bytes or path
        w.tags, w.types = {}, {}
        w.tokens, w.urls = {}, {}
        w.log, w.sent = [], {}
        w.bomb = None
        w.load()
    def load(w):
        idx = json.load(open(os.path.join(w.dir, 'index.json')))
        for m in idx.get('manifests', []):
            w.types[m['digest']] = m['mediaType']
            t = m.get('annotations', {}).get('org.opencontainers.image.ref.name')
            if t: w.tags[t] = m['digest']
        if len(idx.get('manifests', [])) == 1: w.tags.setdefault('latest', idx['manifests'][0]['digest'])
        w.idx = idx
    def blob(w, d):
        with LOCK:
            if d == (w.bomb or {}).get('layer'): pass
            if d in w.extra: return w.extra[d]
        p = os.path.join(w.dir, 'blobs', *d.split(':', 1))
        return p if re.fullmatch(r'sha\d+:[0-9a-f]+', d) and os.path.isfile(p) else None
    def put(w, b, typ=None):
        d = 'sha256:' + hashlib.sha256(b).hexdigest()
        w.extra[d] = b
        if typ: w.types[d] = typ
        return d
    def mkbomb(w):
        with LOCK:
            if w.bomb: return w.bomb['man']
            n = w.a.bomb_gib << 30
            h = tar_header(b'bomb.bin', n)
            co = zlib.compressobj(9, zlib.DEFLATED, -15)
            out = co.compress(h) + co.flush(zlib.Z_FULL_FLUSH)
            z = bytes(64 << 20)
            blk = co.compress(z) + co.flush(zlib.Z_FULL_FLUSH)
            crc, sha = zlib.crc32(h), hashlib.sha256(h)
            parts = [out]
            for _ in range(n // len(z)):
                parts.append(blk); crc = zlib.crc32(z, crc); sha.update(z)
            end = bytes(1024)
            crc = zlib.crc32(end, crc); sha.update(end)
            parts.append(co.compress(end) + co.flush(zlib.Z_FINISH))
            gz = b'\x1f\x8b\x08\0\0\0\0\0\x02\xff' + b''.join(parts) + struct.pack('<II', crc, (len(h) + n + 1024) & 0xffffffff)
            l = w.put(gz)
            cfg = json.dumps({'architecture': 'amd64', 'os': 'linux', 'rootfs': {'type': 'layers', 'diff_ids': ['sha256:' + sha.hexdigest()]}, 'config': {}}).encode()
            c = w.put(cfg)
            m = json.dumps({'schemaVersion': 2, 'mediaType': MT_M, 'config': {'mediaType': 'application/vnd.oci.image.config.v1+json', 'digest': c, 'size': len(cfg)},
                            'layers': [{'mediaType': 'application/vnd.oci.image.layer.v1.tar+gzip', 'digest': l, 'size': len(gz)}]}).encode()
            w.bomb = {'man': w.put(m, MT_M), 'layer': l}
            return w.bomb['man']
    def big(w, base, mb):
        m = json.loads(w.read(base))
        m.setdefault('annotations', {})['evil.pad'] = 'x' * (mb << 20)
        return w.put(json.dumps(m).encode(), m.get('mediaType', MT_M))
    def read(w, d):
        b = w.blob(d)
        return b if isinstance(b, bytes) else open(b, 'rb').read()

MT_M = 'application/vnd.oci.image.manifest.v1+json'
MT_I = 'application/vnd.oci.image.index.v1+json'

def tar_header(name, size):
    num = ('%011o' % size).encode() + b'\0' if size < 8**11 else b'\x80' + size.to_bytes(11, 'big')
    h = name.ljust(100, b'\0') + b'0000644\0' + b'0000000\0' * 2 + num + b'00000000000\0' + b' ' * 8 + b'0' + bytes(100) + b'ustar\x0000' + bytes(247)
    return h[:148] + b'%06o\0 ' % sum(h) + h[156:]

class H(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server_version = 'evil/1'
    def log_message(s, *a): pass
    W = None
    def do_GET(s): s.go()
    def do_HEAD(s): s.go()
    def do_PUT(s): s.go()
    def do_POST(s): s.go()
    # -- plumbing
    def rst(s):
        s.wfile.flush()
        s.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        s.close_connection = True
        try: s.connection.close()
        finally: s.wfile = io.BytesIO(); s.rfile = io.BytesIO()
    def fin(s):
        s.close_connection = True
        try: s.wfile.flush(); s.connection.shutdown(socket.SHUT_RDWR)
        except OSError: pass
    def rec(s, status, n=0, fl=()):
        with LOCK:
            s.W.log.append({'t': round(time.time(), 3), 'm': s.command, 'p': s.path, 'range': s.headers.get('Range'), 'st': status, 'n': n,
                            'port': s.server.server_port, 'auth': bool(s.headers.get('Authorization')), 'faults': list(fl), 'ua': s.headers.get('User-Agent')})
            k = urlsplit(s.path).path
            s.W.sent[k] = s.W.sent.get(k, 0) + n
        if not s.W.a.quiet: print(s.command, s.path[:150], s.headers.get('Range') or '', '->', status, n, ' '.join(fl), file=sys.stderr, flush=True)
    def simple(s, code, body=b'', hdr=(), ctype='application/json', fl=()):
        if isinstance(body, (dict, list)): body = json.dumps(body).encode()
        s.send_response(code)
        for k, v in hdr: s.send_header(k, v)
        if code != 204 and not (code in (301, 302, 307, 308) and not body): s.send_header('Content-Type', ctype)
        s.send_header('Content-Length', str(len(body)))
        s.end_headers()
        if s.command != 'HEAD': s.wfile.write(body)
        s.rec(code, len(body), fl)
    def err(s, code, c, hdr=(), fl=()):
        s.simple(code, {'errors': [{'code': c, 'message': 'evil: ' + c}]}, hdr, fl=fl)
    def f(s, name):
        assert name in NAMES, name
        for f in s.W.faults:
            if f.name == name and f.hit(s.kind, s.command, s.path, s.headers.get('Range')):
                s.fl.append(f.spec); return f
    # -- routing
    def go(s):
        try: s.go2()
        except (BrokenPipeError, ConnectionResetError): s.close_connection = True; s.rec(-1, 0, getattr(s, 'fl', ()))
    def go2(s):
        W, s.fl = s.W, []
        u = urlsplit(s.path); q = parse_qs(u.query); p = u.path
        ln = int(s.headers.get('Content-Length') or 0)
        body = s.rfile.read(ln) if ln else b''
        if p.startswith('/_evil/'): return s.control(p, body)
        if p == '/token': s.kind = 'token'
        elif p.startswith('/storage/'): s.kind = 'storage'
        elif p in ('/v2/', '/v2'): s.kind = 'ping'
        elif '/blobs/' in p: s.kind = 'blob'
        elif '/manifests/' in p: s.kind = 'manifest' if ':' in p.rsplit('/', 1)[1] else 'tag'
        elif '/referrers/' in p: s.kind = 'referrers'
        else: s.kind = 'other'
        if s.f('hdrreset'): s.rec(-2, 0, s.fl); return s.rst()
        f = s.f('hdrstall')
        if f: time.sleep(f.f('secs', 10))
        f = s.f('drip')
        if f:
            raw = s.connection
            for ch in b'HTTP/1.1 200 OK\r\nX-Pad: ' + b'y' * 4096: raw.sendall(bytes([ch])); time.sleep(f.f('secs', 1))
        for n in ('status', 'burst'):
            f = s.f(n)
            if f:
                hd = []
                if 'retry_after' in f.kv:
                    ra = f.f('retry_after')
                    hd = [('Retry-After', email.utils.formatdate(time.time() + ra, usegmt=True) if f.kv.get('date') else str(int(ra)))]
                c = f.i('code', 500 if n == 'burst' else 503)
                if f.kv.get('html'): return s.simple(c, b'<html><h1>Bad</h1></html>', hd, 'text/html', fl=s.fl)
                return s.err(c, 'TOOMANYREQUESTS' if c == 429 else 'UNKNOWN', hd, s.fl)
        if s.f('html'): return s.simple(200, b'<html>Please log in to WiFi</html>', (), 'text/html', s.fl)
        if s.f('emptybody'): return s.simple(200, b'', (), fl=s.fl)
        if s.kind == 'token': return s.token(q)
        if s.kind != 'storage' and not s.auth_ok(p): return
        f = s.command == 'HEAD' and s.f('nohead')
        if f: return s.err(f.i('code', 405), 'UNSUPPORTED', fl=s.fl)
        if s.kind == 'ping': return s.simple(200, {}, [('Docker-Distribution-API-Version', 'registry/2.0')], fl=s.fl)
        if s.kind in ('manifest', 'tag'): return s.manifest(p)
        if s.kind in ('blob', 'storage'): return s.blob(p, q)
        if s.kind == 'referrers': return s.referrers(p, q)
        if p.endswith('/tags/list'): return s.simple(200, {'name': p[4:-10], 'tags': sorted(W.tags)}, fl=s.fl)
        s.err(404, 'NAME_UNKNOWN', fl=s.fl)
    def control(s, p, body):
        W = s.W
        with LOCK:
            if p == '/_evil/log': r = W.log
            elif p == '/_evil/faults' and s.command == 'PUT': W.faults = [Fault(x) for x in json.loads(body)]; W.tokens.clear(); r = [f.spec for f in W.faults]
            elif p == '/_evil/reset': W.log = []; W.sent = {}; W.tokens.clear(); r = []
            else:
                k = {}
                for e in W.log: k['%s %s' % (e['m'], e['st'])] = k.get('%s %s' % (e['m'], e['st']), 0) + 1
                r = {'requests': len(W.log), 'by': k, 'ranges': sum(1 for e in W.log if e['range']), 'bytes': sum(e['n'] for e in W.log),
                     'paths': W.sent, 'faults': {f.spec: f.fired for f in W.faults}}
            r = json.dumps(r).encode()
        s.send_response(200); s.send_header('Content-Length', str(len(r))); s.end_headers(); s.wfile.write(r)
    # -- auth
    def auth_ok(s, p):
        f = next((f for f in s.W.faults if f.name == 'auth'), None)
        if not f or ('match' in f.kv and f.kv['match'] not in p): return True
        t = (s.headers.get('Authorization') or '').partition(' ')
        with LOCK:
            k = s.W.tokens.get(t[2]) if t[0].lower() == 'bearer' else None
            ok = k and not f.kv.get('badtoken')
            if ok and 'every' in f.kv:
                k['n'] += 1; ok = k['n'] <= f.i('every')
            if ok and 'ttl' in f.kv: ok = time.time() < k['t'] + f.f('ttl')
        if ok: return True
        f.fired += 1; s.fl.append(f.spec)
        m = re.match(r'/v2/(.+)/(manifests|blobs|referrers|tags)/', p)
        ch = 'Bearer realm="http%s://%s/token",service="evil"' % ('s' if s.W.a.tls_cert else '', s.headers.get('Host'))
        if m: ch += ',scope="repository:%s:pull"' % m.group(1)
        if t[2]: ch += ',error="invalid_token"'
        s.err(401, 'UNAUTHORIZED', [('WWW-Authenticate', ch)], s.fl)
        return False
    def token(s, q):
        f = next((f for f in s.W.faults if f.name == 'auth'), Fault('auth'))
        if 'user' in f.kv:
            want = 'Basic ' + base64.b64encode(('%s:%s' % (f.kv['user'], f.kv.get('pass', ''))).encode()).decode()
            if s.headers.get('Authorization') != want: return s.err(401, 'UNAUTHORIZED', [('WWW-Authenticate', 'Basic realm="evil"')], s.fl)
        t = base64.urlsafe_b64encode(os.urandom(24)).decode()
        s.W.tokens[t] = {'n': 0, 't': time.time()}
        r = {f.kv.get('field', 'token'): t}
        if not f.kv.get('noexp'): r['expires_in'] = 300
        s.simple(200, r, fl=s.fl)
    # -- content
    def manifest(s, p):
        W, ref = s.W, p.rsplit('/', 1)[1]
        if ref == 'evil-bomb': d = W.mkbomb()
        elif ref == 'evil-big': d = W.big(next(iter(W.tags.values())), 8)
        else: d = ref if ':' in ref else W.tags.get(ref)
        if not d or not W.blob(d): return s.err(404, 'MANIFEST_UNKNOWN', fl=s.fl)
        f = s.kind == 'tag' and s.f('bigmanifest')
        if f: d = W.big(d, f.i('mb', 64))
        b = W.read(d)
        try: typ = W.types.get(d) or json.loads(b).get('mediaType') or (MT_I if b'"manifests"' in b else MT_M)
        except ValueError: typ = MT_M
        hd = d
        f = s.f('badmanifest')
        if f:
            m = f.kv.get('mode', 'space')
            if m == 'space': b += b'\n'
            elif m == 'swap': b = next((W.read(x) for x in W.types if x != d), b + b' ')
            elif m == 'type': typ = 'application/vnd.docker.distribution.manifest.v1+prettyjws'
            elif m == 'schema': j = json.loads(b); j['schemaVersion'] = 1; b = json.dumps(j).encode()
            elif m == 'notjson': b = b'{"schemaVersion":2,' + os.urandom(200)
            elif m == 'digesthdr': hd = 'sha256:' + '0' * 64
        s.send_body(b, typ, [('Docker-Content-Digest', hd), ('ETag', '"%s"' % d)], ranges=False)
    def referrers(s, p, q):
        if s.f('noreferrers'): return s.simple(404, b'404 page not found', (), 'text/plain', s.fl)
        d, out = p.rsplit('/', 1)[1], []
        for m in s.W.idx.get('manifests', []):
            try: j = json.loads(s.W.read(m['digest']))
            except Exception: continue
            if j.get('subject', {}).get('digest') == d:
                at = j.get('artifactType') or j.get('config', {}).get('mediaType')
                if 'artifactType' in q and at not in q['artifactType']: continue
                out.append({'mediaType': m['mediaType'], 'digest': m['digest'], 'size': m['size'], 'artifactType': at, **({'annotations': j['annotations']} if 'annotations' in j else {})})
        hdr = [('OCI-Filters-Applied', 'artifactType')] if 'artifactType' in q else []
        s.simple(200, {'schemaVersion': 2, 'mediaType': MT_I, 'manifests': out}, hdr, MT_I, s.fl)
    def blob(s, p, q):
        d = p.rsplit('/', 1)[1]
        if s.W.bomb is None and s.W.blob(d) is None and 'evil' in p: s.W.mkbomb()
        b = s.W.blob(d)
        if b is None: return s.err(404, 'BLOB_UNKNOWN', fl=s.fl)
        if s.kind == 'storage':
            f = next((f for f in s.W.faults if f.name == 'redirect'), Fault('redirect'))
            sig = q.get('sig', [''])[0]; exp = float(q.get('exp', ['0'])[0])
            good = hmac.new(SECRET, ('%s|%s|%s' % (d, q.get('exp', [''])[0], q.get('n', [''])[0])).encode(), 'sha256').hexdigest()
            if f.kv.get('strict') and s.headers.get('Authorization'):
                s.fl.append('strict'); return s.simple(400, b'<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>', (), 'application/xml', s.fl)
            with LOCK:
                n = s.W.urls[sig] = s.W.urls.get(sig, 0) + 1
            if sig != good or time.time() > exp or ('uses' in f.kv and n > f.i('uses')):
                f.fired += 1; s.fl.append('expired')
                return s.simple(403, b'<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>', (), 'application/xml', s.fl)
        else:
            f = s.f('redirect')
            if f:
                c = f.i('code', 307)
                if f.kv.get('loop'): return s.simple(c, b'', [('Location', s.path)], fl=s.fl)
                exp = '%.3f' % (time.time() + f.f('ttl', 60)); nn = os.urandom(6).hex()
                sig = hmac.new(SECRET, ('%s|%s|%s' % (d, exp, nn)).encode(), 'sha256').hexdigest()
                path = '/storage/%s?exp=%s&n=%s&sig=%s' % (d, exp, nn, sig)
                host = 'localhost' if f.kv.get('cross') else s.headers.get('Host', '').rsplit(':', 1)[0] or '127.0.0.1'
                base = '' if f.kv.get('relative') else 'http%s://%s:%d' % ('s' if s.W.a.tls_cert else '', host, s.W.blob_port)
                return s.simple(c, b'', [('Location', base + path)], fl=s.fl)
        s.send_body(b, 'application/octet-stream', [('Docker-Content-Digest', d), ('ETag', '"%s"' % d)])
    def send_body(s, src, typ, hdr, ranges=True):
        size = len(src) if isinstance(src, bytes) else os.path.getsize(src)
        lo, hi, st = 0, size, 200
        rng = s.headers.get('Range')
        cr = None
        if ranges and rng and not s.f('norange'):
            m = re.fullmatch(r'bytes=(\d*)-(\d*)', rng.strip())
            if s.f('range416'): return s.simple(416, b'', [('Content-Range', 'bytes */%d' % size)], fl=s.fl)
            if m and (m[1] or m[2]):
                if not m[1]: lo = max(0, size - int(m[2]))
                else: lo = int(m[1]); hi = min(size, int(m[2]) + 1) if m[2] else size
                if lo >= size or hi <= lo: return s.simple(416, b'', [('Content-Range', 'bytes */%d' % size)], fl=s.fl)
                st, cr = 206, 'bytes %d-%d/%d' % (lo, hi - 1, size)
        pre = post = b''
        f = st == 206 and s.f('range')
        if f:
            m = f.kv.get('mode', 'shift')
            if m == 'shift': cr = 'bytes %d-%d/%d' % (lo + 1, hi, size)
            elif m == 'total': cr = 'bytes %d-%d/%d' % (lo, hi - 1, size + 12345)
            elif m == 'star': cr = 'bytes %d-%d/*' % (lo, hi - 1)
            elif m == 'missing': cr = None
            elif m == 'short': hi = max(lo + 1, hi - 1); cr = 'bytes %d-%d/%d' % (lo, hi - 1, size)
            elif m == 'long': hi = min(size, hi + 1); cr = 'bytes %d-%d/%d' % (lo, hi - 1, size)
            elif m == 'multipart':
                pre = ('\r\n--EVIL\r\nContent-Type: application/octet-stream\r\nContent-Range: %s\r\n\r\n' % cr).encode(); post = b'\r\n--EVIL--\r\n'
                typ, cr = 'multipart/byteranges; boundary=EVIL', None
        f = st == 206 and s.f('rangedata')
        dsh = f.i('shift', 1) if f else 0
        n = len(pre) + hi - lo + len(post)
        s.send_response(st)
        for k, v in hdr: s.send_header(k, v)
        s.send_header('Content-Type', typ)
        if ranges: s.send_header('Accept-Ranges', 'bytes')
        if cr: s.send_header('Content-Range', cr)
        if s.f('gzenc'): s.send_header('Content-Encoding', 'gzip')
        eoft, cht, wl = s.f('eoftrunc'), s.f('chunktrunc'), s.f('wronglength')
        nol, chk = eoft or s.f('nolength'), cht or s.f('chunked')
        if chk: s.send_header('Transfer-Encoding', 'chunked')
        elif nol: s.send_header('Connection', 'close'); s.close_connection = True
        else: s.send_header('Content-Length', str(n + (wl.i('add', 100) if wl else 0)))
        s.end_headers()
        if s.command == 'HEAD': return s.rec(st, 0, s.fl)
        tr, rs, sl, stl, co = s.f('truncate'), s.f('reset'), s.f('slow'), s.f('stall'), s.f('corrupt')
        cut = [(x.i('at', 100), x) for x in (tr, rs, eoft, cht) if x]
        limit = min(c[0] for c in cut) if cut else None
        bps = sl.f('bps', 1000) if sl else 0
        step = sl.i('chunk', max(1, int(bps / 10))) if sl else 1 << 18
        sent, stalled = 0, False
        fh = io.BytesIO(src) if isinstance(src, bytes) else open(src, 'rb')
        def chunks():
            if pre: yield pre
            pos = lo
            while pos < hi:
                k = min(step, hi - pos)
                fh.seek((pos + dsh) % size); b = fh.read(k)
                if len(b) < k: b += bytes(k - len(b))
                if co:
                    a, e = co.i('at', 0), co.i('at', 0) + co.i('len', 1)
                    x, y = max(a, pos), min(e, pos + k)
                    if x < y: b = b[:x - pos] + bytes(c ^ 0xff for c in b[x - pos:y - pos]) + b[y - pos:]
                yield b
                pos += k
            if post: yield post
        try:
            for b in chunks():
                if limit is not None and sent + len(b) > limit: b = b[:limit - sent]
                if stl and not stalled and sent + len(b) > stl.i('at', 100):
                    h = max(0, stl.i('at', 100) - sent)
                    s.out(b[:h], chk); sent += h; b = b[h:]; s.wfile.flush(); stalled = True; time.sleep(stl.f('secs', 30))
                s.out(b, chk); sent += len(b)
                if limit is not None and sent >= limit: break
                if sl: time.sleep(len(b) / bps)
            if rs: s.rec(st, sent, s.fl); return s.rst()
            if (tr or eoft or cht): s.rec(st, sent, s.fl); return s.fin()
            if chk: s.wfile.write(b'0\r\n\r\n')
        except (BrokenPipeError, ConnectionResetError, OSError):
            s.close_connection = True; s.fl.append('client-went-away')
        s.rec(st, sent, s.fl)
        if wl and wl.i('add', 100) > 0 or s.f('silentclose'): s.fin()
    def out(s, b, chk):
        if not b: return
        s.wfile.write(b'%x\r\n%s\r\n' % (len(b), b) if chk else b)

class Srv(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    def handle_error(s, *a): pass

def main():
    if sys.argv[1:] == ['--list-faults']: return print('\n'.join(FAULTS))
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument('layout'); ap.add_argument('--host', default='127.0.0.1'); ap.add_argument('--port', type=int, default=5000)
    ap.add_argument('--blob-port', type=int, default=None); ap.add_argument('-f', '--fault', action='append', default=[])
    ap.add_argument('--tls-cert'); ap.add_argument('--tls-key'); ap.add_argument('--bomb-gib', type=int, default=2)
    ap.add_argument('--quiet', action='store_true'); ap.add_argument('--portfile')
    a = ap.parse_args()
    H.W = World(a)
    def mk(p):
        s = Srv((a.host, p), H)
        if a.tls_cert:
            c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain(a.tls_cert, a.tls_key); s.socket = c.wrap_socket(s.socket, server_side=True)
        return s
    s1 = mk(a.port); s2 = mk(a.blob_port if a.blob_port is not None else (a.port + 1 if a.port else 0))
    H.W.blob_port = s2.server_port
    if a.portfile: open(a.portfile, 'w').write('%d %d\n' % (s1.server_port, s2.server_port))
    threading.Thread(target=s2.serve_forever, daemon=True).start()
    print('evil registry on %s:%d, storage on %d, tags %s' % (a.host, s1.server_port, s2.server_port, sorted(H.W.tags)), file=sys.stderr, flush=True)
    try: s1.serve_forever()
    except KeyboardInterrupt: pass
main()
