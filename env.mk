# The environment, included by the Makefile. What it offers there:
#   $(PY)     the interpreter to call, always as `$(PY) -m tool`
#   $(READY)  the prerequisite of every target that needs the environment (empty with USE_ENV=1)
# What a user may set:
#   PYTHON=python3.12   the Python that the environment is made with (3.11 to 3.13)
#   VENV=folder         another place than .venv, or an environment that exists already: it gets
#                       the exact pins, nothing in it is removed
#   USE_ENV=1           no set-up at all: use the environment that is active, as it is

PYTHON ?= python3
VENV := .venv

ifdef USE_ENV
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

ENV_STAMP := $(VENV)/.ready
ENV_PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0 $(VENV)/bin/python -m pip

# The stamp holds the folder it was written for: an environment that was moved, copied or lost its
# interpreter is set up again.
ENV_HOME := $(shell test -x '$(VENV)/bin/python' && cat '$(ENV_STAMP)' 2>/dev/null)
ifneq ($(ENV_HOME),$(CURDIR))
$(ENV_STAMP): env-stale
endif

.PHONY: env env-stale lock advisories
env: $(READY) ## set up the environment and nothing else
env-stale:

# One line that stops the recipe.
env_stop = { echo "kelib: $(1)" >&2; exit 1; }

# 1. Only one make at a time (flock where there is one; the lock is held by the open file 9).
# 2. A marker lies in the environment while pip works: whoever finds it starts afresh. It goes
#    when pip stopped before it changed anything (no network, say).
# 3. The stamp is written last, under another name first.
# Temporary files of pip go into the environment: /tmp is often too small for torch.
$(ENV_STAMP): requirements.lock pyproject.toml
	@set -eu; venv='$(VENV)'; stamp='$(ENV_STAMP)'; exec 9<requirements.lock; \
	if command -v flock >/dev/null 2>&1 && ! flock -n 9; then \
	  echo "kelib: another make is setting up $$venv, waiting for it"; flock 9; \
	fi; \
	if [ -x "$$venv/bin/python" ] && [ "$$(cat "$$stamp" 2>/dev/null)" = '$(CURDIR)' ] \
	  && ! [ requirements.lock -nt "$$stamp" ] && ! [ pyproject.toml -nt "$$stamp" ]; then exit 0; fi; \
	if [ -e "$$venv/.installing" ] || ! "$$venv/bin/python" -m pip --version >/dev/null 2>&1; then \
	  if [ -n "$$(ls -A "$$venv" 2>/dev/null)" ] && ! [ -e "$$venv/pyvenv.cfg" ]; then \
	    $(call env_stop,$$venv holds files but no usable Python with pip: name an empty folder or an environment (make VENV=folder)); \
	  fi; \
	  python='$(PYTHON)'; \
	  command -v "$$python" >/dev/null 2>&1 || \
	    $(call env_stop,$$python was not found: install Python 3.11$(comma) 3.12 or 3.13$(comma) or name it (make PYTHON=/path/to/python3.12)); \
	  version=$$("$$python" -c 'import platform; print(platform.python_version())'); \
	  case $$version in 3.11.*|3.12.*|3.13.*) ;; *) \
	    found=; for name in python3.13 python3.12 python3.11; do \
	      "$$name" -c '' >/dev/null 2>&1 && found="$$found $$name"; done; \
	    $(call env_stop,$$python is Python $$version but 3.11$(comma) 3.12 or 3.13 is needed: name one (make PYTHON=python3.12)$${found:+; found here:$$found}); \
	  esac; \
	  "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || \
	    $(call env_stop,$$python cannot make virtual environments because its venv or ensurepip module is missing: install it (Debian and Ubuntu: apt install python3-venv) or use environment.yml); \
	  echo "kelib: making $$venv with Python $$version"; \
	  mkdir -p "$$venv" || $(call env_stop,$$venv cannot be written: change the permissions or name another folder (make VENV=folder)); \
	  "$$python" -m venv --clear "$$venv" || \
	    $(call env_stop,$$venv could not be made (see above): check free space and permissions and call make again); \
	fi; \
	rm -f "$$stamp"; : > "$$venv/.installing" || \
	  $(call env_stop,$$venv cannot be written: change the permissions or name another folder (make VENV=folder)); \
	echo "kelib: installing the exact pins of requirements.lock into $$venv, minutes the first time"; \
	echo "kelib: a fresh set-up downloads 0.5 GB (2.4 GB on disk) with a CPU build of torch, or 3 GB"; \
	echo "kelib: (7.5 GB on disk) with the CUDA build, which is what a registry has for Linux; see README"; \
	mkdir -p "$$venv/tmp"; \
	( seconds=0; while sleep 30 >/dev/null 2>&1 9<&-; do kill -0 $$$$ 2>/dev/null || exit 0; \
	  seconds=$$((seconds + 30)); \
	  echo "kelib: $$seconds s, $$(du -sm "$$venv" 2>/dev/null | cut -f1) MB so far"; done ) 9<&- & progress=$$!; \
	trap 'kill $$progress 2>/dev/null || :' EXIT; trap 'exit 130' INT; \
	TMPDIR="$$(cd "$$venv/tmp" && pwd)"; export TMPDIR; \
	if ! $(ENV_PIP) install -qq --requirement requirements.lock; then \
	  [ -n "$$(find "$$venv/lib" -maxdepth 2 -name site-packages -newer "$$venv/.installing" 2>/dev/null)" ] \
	    || rm -f "$$venv/.installing"; \
	  $(call env_stop,pip could not install requirements.lock (see above): check network and free space and call make again); \
	fi; \
	rm -rf "$$venv/tmp" "$$venv/.installing"; unset TMPDIR; \
	$(ENV_PIP) install -qq --no-deps --no-build-isolation --editable . || \
	  $(call env_stop,pip could not install kelib itself (see above)); \
	echo '$(CURDIR)' > "$$stamp.part"; mv "$$stamp.part" "$$stamp"; \
	echo "kelib: environment ready in $$venv"

comma := ,

# Keeps the pins that still fit; LOCK_FLAGS=--upgrade takes the newest of everything. Needs uv.
UV ?= uv
LOCK_FLAGS ?=
# Parts of torch's CUDA build, for one platform only: left to torch's own metadata.
LOCK_EXCLUDES := cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 \
	nvidia-nccl-cu13 nvidia-nvshmem-cu13 triton
# In an environment of its own, thrown away afterwards. A package that could not be looked up is a
# failure: without that, a registry that knows no advisories would pass for good news.
advisories: ## published vulnerabilities of the locked packages (needs a network)
	@set -eu; place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; $(PYTHON) -m venv "$$place"; \
	"$$place/bin/python" -m pip install --quiet pip-audit; \
	"$$place/bin/python" -m pip_audit --strict --no-deps --disable-pip -r requirements.lock

lock: ## write requirements.lock anew from pyproject.toml (needs uv)
	@set -eu; trap 'rm -f .venv.lock.part .venv.excludes.part' EXIT; \
	printf '%s\n' $(LOCK_EXCLUDES) > .venv.excludes.part; \
	cp requirements.lock .venv.lock.part 2>/dev/null || :; \
	$(UV) pip compile pyproject.toml --output-file .venv.lock.part --quiet --no-header \
	  --universal --python-version 3.11 --fork-strategy fewest --extra dev --extra notebooks \
	  --extra tasks --extra gguf --extra cluster \
	  --excludes .venv.excludes.part --annotation-style line $(LOCK_FLAGS); \
	{ printf '%s\n' \
	  "# Exact pins of kelib with its extras notebooks, tasks, gguf, cluster and dev, all transitive" \
	  "# dependencies included, for Python 3.11, 3.12 and 3.13. Used by make and by environment.yml." \
	  "# Regenerate with: make lock (needs uv; make lock LOCK_FLAGS=--upgrade for newer versions)." \
	  "# The nvidia, cuda and triton packages are not listed: pip takes them from the metadata of" \
	  "# torch where its build needs them. There are no local version suffixes either, so that" \
	  "# torch may be the CUDA or the CPU build of the version below, whichever pip is offered."; \
	  cat .venv.lock.part; } > requirements.lock.part; mv requirements.lock.part requirements.lock
