/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Calls to the hypervisor: SMC Calling Convention (Arm DEN 0028) by HVC, and
 * KVM's vendor-specific services.
 */
#ifndef SMCCC_H
#define SMCCC_H

#include <stdint.h>

#define SMCCC_VERSION 0x80000000
#define SMCCC_VENDOR_UID 0x8600FF01
#define KVM_FEATURES 0x86000000
#define KVM_HYP_MEMINFO 0xC6000002
#define KVM_MEM_SHARE 0xC6000003
#define KVM_MEM_UNSHARE 0xC6000004

/* Bits of KVM_FEATURES that together make memory protection. */
#define KVM_FEATURES_PROTECTED (1 << 2 | 1 << 3 | 1 << 4)

#define SMCCC_SUCCESS 0
#define SMCCC_NOT_SUPPORTED (-1)
#define SMCCC_NOT_REQUIRED (-2)
#define SMCCC_INVALID_PARAMETER (-3)

struct hvc_result {
	uint64_t x0, x1, x2, x3;
};

/* HVC #0 with X0 = function and three arguments; X4-X17 are the callee's to change. */
struct hvc_result hvc(uint64_t function, uint64_t x1, uint64_t x2, uint64_t x3);

/* What the hypervisor says of itself. */
struct hypervisor {
	uint32_t smccc;		/* major << 16 | minor */
	uint32_t psci;		/* the same */
	uint64_t granule;	/* bytes; 0 unless protected */
	int is_kvm;		/* the vendor UID is KVM's */
	int protects;		/* it offers MEM_SHARE, MEM_UNSHARE and HYP_MEMINFO */
};

struct hypervisor ask_hypervisor(void);

/* A return code of SMCCC or of KVM's services in words. */
const char *smccc_words(int64_t code);

#endif
