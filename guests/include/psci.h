/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Power State Coordination Interface (Arm DEN 0022). */
#ifndef PSCI_H
#define PSCI_H

#include <stdint.h>

#define PSCI_VERSION 0x84000000
#define PSCI_CPU_OFF 0x84000002
#define PSCI_SYSTEM_OFF 0x84000008
#define PSCI_SYSTEM_RESET 0x84000009
#define PSCI_CPU_ON 0xC4000003
#define PSCI_AFFINITY_INFO 0xC4000004

#define PSCI_SUCCESS 0
#define PSCI_INVALID_PARAMETERS (-2)
#define PSCI_ALREADY_ON (-4)

#define PSCI_AFFINITY_ON 0
#define PSCI_AFFINITY_OFF 1

#ifndef __ASSEMBLER__
int64_t psci_cpu_on(uint64_t mpidr, uint64_t entry, uint64_t context);
int64_t psci_affinity_info(uint64_t mpidr);

/* These do not come back; should they, the CPU waits for ever. */
_Noreturn void psci_cpu_off(void);
_Noreturn void psci_system_off(void);
_Noreturn void psci_system_reset(void);

/* A return code in words. */
const char *psci_words(int64_t code);
#endif

#endif
