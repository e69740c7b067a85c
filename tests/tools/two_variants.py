#!/usr/bin/env python3
"""two_variants.py REPOSITORY TAG NEW: makes an index NEW of the image TAG (for this machine's architecture) and of a copy of
it for linux/s390x; prints the digests of the copy."""
import hashlib
import json
import platform
import sys
import urllib.request

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def call(url, data=None, method="GET", **headers):
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request) as answer:
        return answer.read(), answer.headers


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


repository, tag, new = sys.argv[1:]
arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
ours, _ = call(f"{repository}/manifests/{tag}", Accept=MANIFEST)
theirs = json.loads(ours)
config = json.loads(call(f"{repository}/blobs/{theirs['config']['digest']}")[0])
config["architecture"] = "s390x"
config = json.dumps(config).encode()
_, headers = call(f"{repository}/blobs/uploads/", b"", "POST")
separator = "&" if "?" in headers["Location"] else "?"
call(f"{headers['Location']}{separator}digest={digest(config)}", config, "PUT",
     **{"Content-Type": "application/octet-stream"})
theirs["config"].update(digest=digest(config), size=len(config))
theirs = json.dumps(theirs).encode()
call(f"{repository}/manifests/{digest(theirs)}", theirs, "PUT", **{"Content-Type": MANIFEST})
index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [
    {"mediaType": MANIFEST, "digest": digest(data), "size": len(data), "platform": {"os": "linux", "architecture": a}}
    for data, a in ((ours, arch), (theirs, "s390x"))]}
call(f"{repository}/manifests/{new}", json.dumps(index).encode(), "PUT", **{"Content-Type": INDEX})
print(json.dumps({"manifest": digest(theirs), "config": digest(config)}))
