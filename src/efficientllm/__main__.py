"""`python -m efficientllm`."""

import sys

from efficientllm.cli import main

sys.exit(main())
