"""mteb keeps caches under these folders; a fresh one each run, since its data cache does not see that data has changed."""

import os
import tempfile

FOLDER = tempfile.mkdtemp(prefix="shoal-mteb-")
os.environ["HF_HOME"] = f"{FOLDER}/hf"
os.environ["MTEB_CACHE"] = f"{FOLDER}/mteb"
